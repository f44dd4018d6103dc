// Closed-loop or paced load on one thread: what one client process can ask, and how long the answers took.
//
//   load --ports P[,P] --connections C --request FILE [--expect TEXT] [--events N]
//        [--warmup S] [--seconds S | --requests N] [--rate R] [--seed N]
//
// FILE is a whole HTTP request. Without --rate each connection asks again when it has its answer (closed loop);
// with it requests start at the times of a Poisson process, on whichever connection is free, and their latency
// counts from the time they should have started. What ends between the lines "begin" and "end" on stdout is
// counted; then requests still open are waited for, and the last line is one JSON object. --requests: no
// warm-up, ends after so many. A response must have status 200 and either contain TEXT or, streaming, N events.

#include <algorithm>
#include <deque>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

#include "wire.hpp"

using namespace bench;

namespace {

constexpr int64_t kDrainNs = 30 * kSecond;

struct Options {
    std::vector<int> ports;
    int connections = 1;
    std::string request, expect;
    int events = 0;
    double warmup_s = 0.5, seconds = 2, rate = 0;
    int64_t requests = 0;
    unsigned seed = 7;
};

struct Connection {
    int fd = -1, port = 0;
    bool is_busy = false;
    int64_t started_ns = 0, first_ns = 0;
    std::string in;    // head, or body that has not been looked at
    std::string text;  // decoded body: all of it, or the tail without a whole event
    Head head;
    int64_t body_left = 0;
    int status = 0, num_events = 0;
    ChunkReader chunks;
};

// A sorted sample's figures, in microseconds.
std::string Figures(std::vector<float>& us) {
    std::sort(us.begin(), us.end());
    auto at = [&](double share) { return us.empty() ? 0.f : us[static_cast<size_t>(share * (us.size() - 1) + 0.5)]; };
    double sum = 0;
    for (float value : us) sum += value;
    char text[256];
    snprintf(text, sizeof text, "{\"n\": %zu, \"mean\": %.1f, \"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"max\": %.1f}",
             us.size(), us.empty() ? 0 : sum / static_cast<double>(us.size()), at(.5), at(.9), at(.99), at(1));
    return text;
}

class Load {
  public:
    explicit Load(Options options) : o_(std::move(options)), epoll_(epoll_create1(0)), random_(o_.seed) {}

    void Run() {
        connections_.resize(static_cast<size_t>(o_.connections));
        for (size_t i = 0; i < connections_.size(); ++i) {
            connections_[i].port = o_.ports[i % o_.ports.size()];
            Connect(&connections_[i]);
        }
        started_ns_ = NowNs();
        begin_ns_ = started_ns_ + (o_.requests ? 0 : Ns(o_.warmup_s));
        end_ns_ = o_.requests ? kForever : begin_ns_ + Ns(o_.seconds);
        for (auto& c : connections_) idle_.push_back(&c);
        next_arrival_ns_ = o_.rate > 0 ? started_ns_ : kForever;
        if (o_.rate <= 0) StartIdle();
        Loop();
        Print();
    }

  private:
    enum Phase { kWarmup, kMeasured, kDraining };

    static int64_t Ns(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

    void Loop() {
        epoll_event events[512];
        for (;;) {
            int64_t now = NowNs();
            if (phase_ == kWarmup && now >= begin_ns_) Announce("begin", kMeasured, &begin_ns_);
            if (phase_ == kMeasured && (now >= end_ns_ || (o_.requests && num_done_ >= o_.requests))) {
                Announce("end", kDraining, &end_ns_);
                next_arrival_ns_ = kForever;
                late_.clear();
            }
            if (phase_ == kDraining && (!num_busy_ || now > end_ns_ + kDrainNs)) return;
            Arrive(now);
            int64_t turn = phase_ == kWarmup ? begin_ns_ : phase_ == kMeasured ? end_ns_ : end_ns_ + kDrainNs;
            int count = WaitUntil(epoll_, events, 512, std::min(turn, next_arrival_ns_));
            for (int i = 0; i < count; ++i) Read(static_cast<Connection*>(events[i].data.ptr));
        }
    }

    void Announce(const char* what, Phase next, int64_t* when) {
        phase_ = next;
        *when = NowNs();
        puts(what);
        fflush(stdout);
    }

    // -- starting requests -----------------------------------------------------------------------

    void Arrive(int64_t now) {
        std::exponential_distribution<double> gap(o_.rate > 0 ? o_.rate : 1);
        while (next_arrival_ns_ <= now) {
            late_.push_back(next_arrival_ns_);
            next_arrival_ns_ += Ns(gap(random_));
        }
        while (!late_.empty() && !idle_.empty()) {
            Connection* c = idle_.back();
            idle_.pop_back();
            Start(c, late_.front());
            late_.pop_front();
        }
    }

    void StartIdle() {
        while (!idle_.empty() && MayStart()) {
            Connection* c = idle_.back();
            idle_.pop_back();
            Start(c, NowNs());
        }
    }

    bool MayStart() const { return phase_ != kDraining && (!o_.requests || num_started_ < o_.requests); }

    void Connect(Connection* c) {
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address = Loopback(c->port);
        if (connect(c->fd, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) Fail("connect");
        SetNoDelay(c->fd);
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        Watch(epoll_, EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
    }

    void Start(Connection* c, int64_t due_ns) {
        c->is_busy = true;
        ++num_busy_;
        ++num_started_;
        c->started_ns = due_ns;
        c->first_ns = 0;
        c->status = c->num_events = 0;
        c->head = {};
        c->in.clear();
        c->text.clear();
        c->chunks.Reset();
        // Small, and the connection is idle: it always fits the socket's buffer.
        if (send(c->fd, o_.request.data(), o_.request.size(), MSG_NOSIGNAL) < 0) Broken(c);
    }

    // -- reading answers -------------------------------------------------------------------------

    void Read(Connection* c) {
        ssize_t size = recv(c->fd, buffer_, sizeof buffer_, 0);
        if (size <= 0) {
            if (size == 0 || (errno != EAGAIN && errno != EINTR)) Broken(c);
            return;
        }
        std::string_view data(buffer_, static_cast<size_t>(size));
        if (!c->head.size) {
            c->in.append(data);
            c->head = ParseHead(c->in);
            if (!c->head.size) return;
            c->status = c->in.size() > 12 ? atoi(c->in.c_str() + 9) : 0;
            c->body_left = std::max<int64_t>(0, c->head.content_length);
            rest_.assign(c->in, c->head.size);
            data = rest_;
        }
        Body(c, data);
    }

    void Body(Connection* c, std::string_view data) {
        if (c->head.is_chunked) {
            c->chunks.Feed(data, &c->text);
        } else {
            c->text.append(data);
            c->body_left -= static_cast<int64_t>(data.size());
        }
        if (o_.events) TakeEvents(c);
        if (c->head.is_chunked ? c->chunks.is_done() : c->body_left <= 0) Complete(c);
    }

    void TakeEvents(Connection* c) {
        int64_t now = NowNs();
        size_t from = 0, end;
        while ((end = c->text.find("\n\n", from)) != std::string::npos) {
            std::string_view event(c->text.data() + from, end - from);
            int64_t sent_ns = ReadStamp(event);
            if (sent_ns >= 0 && phase_ == kMeasured) delay_us_.push_back(static_cast<float>(now - sent_ns) / 1e3f);
            if (!c->num_events++) c->first_ns = now;
            num_events_ += phase_ == kMeasured;
            from = end + 2;
        }
        c->text.erase(0, from);
    }

    void Complete(Connection* c) {
        bool is_right = c->status == 200 && (o_.events ? c->num_events == o_.events
                                                       : c->text.find(o_.expect) != std::string::npos);
        int64_t now = NowNs();
        ++num_done_;
        if (!is_right) {
            ++num_wrong_;
            if (example_.empty()) example_ = std::to_string(c->status) + " " + c->text.substr(0, 200);
        } else if (phase_ == kMeasured) {
            ++num_measured_;
            latency_us_.push_back(static_cast<float>(now - c->started_ns) / 1e3f);
            if (c->first_ns) first_us_.push_back(static_cast<float>(c->first_ns - c->started_ns) / 1e3f);
        }
        Idle(c);
    }

    void Idle(Connection* c) {
        c->is_busy = false;
        --num_busy_;
        idle_.push_back(c);
        if (o_.rate <= 0) StartIdle();
    }

    // Closed under us: an error if it was to answer, and a new connection takes its place.
    void Broken(Connection* c) {
        close(c->fd);
        Connect(c);
        if (!c->is_busy) return;
        ++num_broken_;
        ++num_done_;
        Idle(c);
    }

    void Print() {
        std::string example;
        for (char ch : example_) example += ch == '"' || ch == '\\' || ch < 32 ? ' ' : ch;
        double window_s = static_cast<double>(end_ns_ - begin_ns_) / 1e9;
        printf("{\"seconds\": %.6f, \"requests\": %ld, \"events\": %ld, \"done\": %ld, \"wrong\": %ld, \"broken\": %ld, "
               "\"unfinished\": %ld, \"latency_us\": %s, \"first_us\": %s, \"delay_us\": %s, \"example\": \"%s\"}\n",
               window_s, num_measured_, num_events_, num_done_, num_wrong_, num_broken_, num_busy_,
               Figures(latency_us_).c_str(), Figures(first_us_).c_str(), Figures(delay_us_).c_str(), example.c_str());
    }

    Options o_;
    int epoll_;
    std::mt19937_64 random_;
    Phase phase_ = kWarmup;
    int64_t started_ns_ = 0, begin_ns_ = 0, end_ns_ = 0, next_arrival_ns_ = kForever;
    std::vector<Connection> connections_;
    std::vector<Connection*> idle_;
    std::deque<int64_t> late_;  // requests due that have no free connection
    int64_t num_busy_ = 0, num_started_ = 0, num_done_ = 0, num_measured_ = 0, num_events_ = 0;
    int64_t num_wrong_ = 0, num_broken_ = 0;
    std::vector<float> latency_us_, first_us_, delay_us_;
    std::string rest_, example_;
    char buffer_[262144];
};

std::string Slurp(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

Options Parse(int argc, char** argv) {
    Options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        std::string name = argv[i];
        const char* value = argv[i + 1];
        if (name == "--ports") {
            std::stringstream list(value);
            for (std::string port; std::getline(list, port, ',');) o.ports.push_back(atoi(port.c_str()));
        } else if (name == "--connections") o.connections = atoi(value);
        else if (name == "--request") o.request = Slurp(value);
        else if (name == "--expect") o.expect = value;
        else if (name == "--events") o.events = atoi(value);
        else if (name == "--warmup") o.warmup_s = atof(value);
        else if (name == "--seconds") o.seconds = atof(value);
        else if (name == "--requests") o.requests = atoll(value);
        else if (name == "--rate") o.rate = atof(value);
        else if (name == "--seed") o.seed = static_cast<unsigned>(atoi(value));
        else fprintf(stderr, "unknown option %s\n", name.c_str()), exit(2);
    }
    if (o.ports.empty() || o.request.empty()) fprintf(stderr, "--ports and --request are needed\n"), exit(2);
    return o;
}

}  // namespace

int main(int argc, char** argv) {
    auto* load = new Load(Parse(argc, argv));
    load->Run();
}
