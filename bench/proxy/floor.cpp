// The least a balancer can do: what any program pays the kernel for, and hardly more. Not for use.
//
//   floor --host H --port P --prefill URL PORT ... --decode URL ...
//
// One thread, epoll, no limits, no errors, no policy but taking turns: reads a request, puts a bootstrap room in
// front of its fields, sends it to a prefill and a decode worker over kept connections, and passes decode's bytes
// on as they come. Only the framing of answers is looked at, to know when a connection is free again.

#include <deque>
#include <vector>

#include "wire.hpp"

using namespace bench;

namespace {

struct Connection {
    int fd = -1;
    Connection* client = nullptr;              // of an upstream: whose request it answers
    std::vector<Connection*>* pool = nullptr;  // of an upstream: where it belongs when it is free
    bool is_decode = false, is_listener = false;
    std::string in;
    Head head;
    int64_t left = 0;
    ChunkReader chunks;
};

struct Worker {
    int port;
    int bootstrap_port;
    std::vector<Connection*> idle;
};

class Floor {
  public:
    Floor(int port, std::vector<Worker> prefill, std::vector<Worker> decode)
        : epoll_(epoll_create1(0)), prefill_(std::move(prefill)), decode_(std::move(decode)) {
        auto* listener = New(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
        listener->is_listener = true;
        int one = 1;
        setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        sockaddr_in address = Loopback(port);
        if (bind(listener->fd, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) Fail("bind");
        if (listen(listener->fd, 4096) < 0) Fail("listen");
        Watch(epoll_, EPOLL_CTL_ADD, listener->fd, EPOLLIN, listener);
    }

    void Run() {
        epoll_event events[256];
        for (;;) {
            int count = WaitUntil(epoll_, events, 256, kForever);
            for (int i = 0; i < count; ++i) {
                auto* c = static_cast<Connection*>(events[i].data.ptr);
                if (c->is_listener) Accept(c->fd);
                else Read(c);
            }
        }
    }

  private:
    Connection* New(int fd) {
        if (fd < 0) Fail("socket");
        auto* c = &connections_.emplace_back();
        c->fd = fd;
        return c;
    }

    void Accept(int listener) {
        int fd;
        while ((fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0) {
            SetNoDelay(fd);
            Watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, New(fd));
        }
    }

    Connection* Take(Worker* worker, bool is_decode) {
        if (!worker->idle.empty()) {
            Connection* c = worker->idle.back();
            worker->idle.pop_back();
            return c;
        }
        Connection* c = New(socket(AF_INET, SOCK_STREAM, 0));
        sockaddr_in address = Loopback(worker->port);
        if (connect(c->fd, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) Fail("connect");
        SetNoDelay(c->fd);
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        c->pool = &worker->idle;
        c->is_decode = is_decode;
        Watch(epoll_, EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
        return c;
    }

    void Read(Connection* c) {
        ssize_t size = recv(c->fd, buffer_, sizeof buffer_, 0);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (size <= 0) {  // a client that leaves between requests: nothing else happens in a bench
            close(c->fd);
            return;
        }
        std::string_view data(buffer_, static_cast<size_t>(size));
        if (c->pool) return Answer(c, data);
        c->in.append(data);
        Head head = ParseHead(c->in);
        size_t length = head.size + static_cast<size_t>(head.content_length > 0 ? head.content_length : 0);
        if (!head.size || c->in.size() < length) return;
        Dispatch(c, head.size);
        c->in.clear();
    }

    void Dispatch(Connection* client, size_t head_size) {
        std::string_view path(client->in);
        path = path.substr(5, path.find(' ', 5) - 5);
        Worker* prefill = &prefill_[turn_ % prefill_.size()];
        Worker* decode = &decode_[turn_ % decode_.size()];
        std::string body = "{\"bootstrap_host\":\"127.0.0.1\",\"bootstrap_port\":" +
                           std::to_string(prefill->bootstrap_port) +
                           ",\"bootstrap_room\":" + std::to_string(++turn_) + "," +
                           client->in.substr(head_size + 1);
        std::string request = "POST " + std::string(path) + " HTTP/1.1\r\nhost: 127.0.0.1\r\n" +
                              "content-type: application/json\r\ncontent-length: " + std::to_string(body.size()) +
                              "\r\n\r\n" + body;
        for (bool is_decode : {false, true}) {
            Connection* leg = Take(is_decode ? decode : prefill, is_decode);
            leg->client = client;
            Send(leg->fd, request);
        }
    }

    void Answer(Connection* leg, std::string_view data) {
        if (leg->is_decode) Send(leg->client->fd, data);
        if (!leg->head.size) {
            leg->in.append(data);
            leg->head = ParseHead(leg->in);
            if (!leg->head.size) return;
            leg->left = leg->head.content_length;
            data = std::string_view(leg->in).substr(leg->head.size);
        }
        scratch_.clear();
        if (leg->head.is_chunked) leg->chunks.Feed(data, &scratch_);
        else leg->left -= static_cast<int64_t>(data.size());
        if (leg->head.is_chunked ? !leg->chunks.is_done() : leg->left > 0) return;
        leg->head = {};
        leg->in.clear();
        leg->chunks.Reset();
        leg->pool->push_back(leg);
    }

    // What a socket does not take at once is waited for: readers of a bench keep up.
    static void Send(int fd, std::string_view data) {
        while (!data.empty()) {
            ssize_t sent = send(fd, data.data(), data.size(), MSG_NOSIGNAL);
            if (sent < 0 && errno != EAGAIN) return;
            if (sent > 0) data.remove_prefix(static_cast<size_t>(sent));
        }
    }

    int epoll_;
    std::vector<Worker> prefill_, decode_;
    std::deque<Connection> connections_;
    size_t turn_ = 0;
    std::string scratch_;
    char buffer_[65536];
};

int PortOf(const char* url) {
    const char* colon = strrchr(url, ':');
    return colon ? atoi(colon + 1) : 0;
}

}  // namespace

int main(int argc, char** argv) {
    int port = 0;
    std::vector<Worker> prefill, decode;
    for (int i = 1; i + 1 < argc; ++i) {
        if (!strcmp(argv[i], "--port")) port = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--decode")) decode.push_back({PortOf(argv[++i]), 0, {}});
        else if (!strcmp(argv[i], "--prefill") && i + 2 < argc) {
            prefill.push_back({PortOf(argv[i + 1]), atoi(argv[i + 2]), {}});
            i += 2;
        }
    }
    if (prefill.empty() || decode.empty()) return 2;
    auto* floor = new Floor(port, std::move(prefill), std::move(decode));
    floor->Run();
}
