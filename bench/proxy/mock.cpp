// Prefill and decode workers that cost almost nothing: all of a fleet's ports in one process and one thread.
//
//   mock PREFILLS DECODES  ->  prints {"prefill": [ports], "decode": [ports]} and serves until it is killed
//
// A generation request with a bootstrap_room is answered by decode once prefill has seen the same room, as in
// SGLang; a room that only one side has seen is counted. Without a room a worker answers at once: the direct
// baseline. The prompt says how fast: "pace=10" is one token each 10 ms, in step with the worker's own clock
// as an engine's batch would be; without it one token goes out per turn of the loop for every stream.
//
// GET /mock/stats answers what was counted, GET /mock/reset starts over.

#include <deque>
#include <queue>
#include <unordered_map>
#include <unordered_set>

#include "answers.hpp"

using namespace bench;

namespace {

constexpr int64_t kRoomWaitNs = 10 * kSecond;  // longer than any balancer takes between its two legs
constexpr int kMaxWorkers = 64;

struct Worker {
    int fd = -1, port = 0, phase = 0;
    bool is_prefill = false;
    int64_t num_running = 0, num_served = 0;
};

struct Connection {
    int fd = -1;
    uint64_t life = 0;  // grows with every request and at the end: what an old Ref points to is over
    Worker* worker = nullptr;
    std::string in, out;
    // The request being answered; none while total is 0.
    Route route = Route::kGenerate;
    bool is_stream = false, is_parked = false, is_streaming = false;
    int done = 0, total = 0;
    int64_t pace_ns = 0, room = -1;
};

// A request in a queue or timer; connections are never freed, only used again.
struct Ref {
    Connection* connection;
    uint64_t life;
    bool is_live() const { return connection->life == life; }
};

struct Timer {
    int64_t due_ns;
    Ref ref;
    bool operator<(const Timer& other) const { return due_ns > other.due_ns; }  // earliest on top
};

struct Counts {
    int64_t prefills = 0, decodes = 0, matched = 0, mismatched = 0, aborts = 0, events = 0, broken = 0, other = 0;
};

class Mock {
  public:
    Mock(int num_prefill, int num_decode) : epoll_(epoll_create1(0)) {
        std::string ports[2];
        for (int i = 0; i < num_prefill + num_decode; ++i) {
            bool is_prefill = i < num_prefill;
            std::string& list = ports[is_prefill ? 0 : 1];
            list += (list.empty() ? "" : ", ") + std::to_string(Listen(&workers_[i], i, is_prefill));
        }
        printf("{\"prefill\": [%s], \"decode\": [%s]}\n", ports[0].c_str(), ports[1].c_str());
        fflush(stdout);
    }

    void Run() {
        epoll_event events[256];
        for (;;) {
            int64_t deadline = !eager_.empty() ? 0 : timers_.empty() ? kForever : timers_.top().due_ns;
            int count = WaitUntil(epoll_, events, 256, deadline);
            for (int i = 0; i < count; ++i) Handle(events[i]);
            StepEager();
            StepTimers();
            RefuseLate();
            free_.insert(free_.end(), closed_.begin(), closed_.end());
            closed_.clear();
        }
    }

  private:
    // -- sockets ---------------------------------------------------------------------------------

    int Listen(Worker* worker, int index, bool is_prefill) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        sockaddr_in address = Loopback(0);
        socklen_t size = sizeof address;
        if (bind(fd, reinterpret_cast<sockaddr*>(&address), size) < 0) Fail("bind");
        if (listen(fd, 4096) < 0) Fail("listen");
        getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
        *worker = Worker{fd, ntohs(address.sin_port), index, is_prefill};
        Watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, worker);
        return worker->port;
    }

    void Handle(const epoll_event& event) {
        auto* worker = static_cast<Worker*>(event.data.ptr);
        if (worker >= workers_ && worker < workers_ + kMaxWorkers) return Accept(worker);
        auto* c = static_cast<Connection*>(event.data.ptr);
        if (c->fd >= 0 && event.events & EPOLLOUT) Write(c, {});
        if (c->fd >= 0 && event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) Read(c);
    }

    void Accept(Worker* worker) {
        int fd;
        while ((fd = accept4(worker->fd, nullptr, nullptr, SOCK_NONBLOCK)) >= 0) {
            SetNoDelay(fd);
            if (free_.empty()) free_.push_back(&pool_.emplace_back());
            Connection* c = free_.back();
            free_.pop_back();
            c->fd = fd;
            c->worker = worker;
            Watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, c);
        }
    }

    void Close(Connection* c) {
        if (c->fd < 0) return;
        close(c->fd);
        c->fd = -1;
        if (c->total) {
            ++counts_.broken;
            End(c);
        }
        ++c->life;
        c->in.clear();
        c->out.clear();
        closed_.push_back(c);  // this turn's events may still name it
    }

    void Read(Connection* c) {
        ssize_t size = recv(c->fd, buffer_, sizeof buffer_, 0);
        if (size <= 0) {
            if (size == 0 || (errno != EAGAIN && errno != EINTR)) Close(c);
            return;
        }
        c->in.append(buffer_, static_cast<size_t>(size));
        while (c->fd >= 0 && !c->total) {  // nobody pipelines
            Head head = ParseHead(c->in);
            if (head.is_chunked) return Close(c);  // none of the balancers sends these
            size_t length = head.size + static_cast<size_t>(std::max<int64_t>(0, head.content_length));
            if (!head.size || c->in.size() < length) return;
            std::string request = c->in.substr(0, length);
            c->in.erase(0, length);
            Serve(c, request, head.size);
        }
    }

    // Sends data after what already waits.
    void Write(Connection* c, std::string_view data) {
        if (!c->out.empty() && !data.empty()) {
            c->out.append(data);
            return;
        }
        bool was_waiting = !c->out.empty();
        if (was_waiting) data = c->out;
        ssize_t sent = send(c->fd, data.data(), data.size(), MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return Close(c);
        std::string rest(data.substr(static_cast<size_t>(std::max<ssize_t>(0, sent))));
        c->out = std::move(rest);
        if (c->out.empty() == was_waiting) {
            if (was_waiting && c->is_stream && c->total && !c->pace_ns) eager_.push_back({c, c->life});
            Watch(epoll_, EPOLL_CTL_MOD, c->fd, c->out.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT, c);
        }
    }

    void WriteStamped(Connection* c, const Template& message) {
        scratch_ = message.bytes;
        WriteStamp(&scratch_[message.stamp_at], NowNs());
        Write(c, scratch_);
    }

    // -- control ---------------------------------------------------------------------------------

    void Serve(Connection* c, std::string_view request, size_t head_size) {
        size_t from = request.find(' ') + 1;
        std::string_view path = request.substr(from, request.find_first_of(" ?", from) - from);
        std::string_view body = request.substr(head_size);
        if (path == "/generate") return Generate(c, Route::kGenerate, body);
        if (path == "/v1/chat/completions") return Generate(c, Route::kChat, body);
        if (path == "/abort_request") ++counts_.aborts;
        if (path == "/mock/reset") {
            counts_ = {};
            streams_peak_ = num_streams_;
            lonely_.clear();
        }
        Write(c, Control(*c->worker, path));
    }

    std::string Control(const Worker& worker, std::string_view path) {
        std::string mode = worker.is_prefill ? "\"prefill\"" : "\"decode\"";
        if (path == "/mock/stats" || path == "/mock/reset") return Respond(Stats());
        if (path == "/v1/loads") return Respond(LoadsOf(worker.num_running, worker.num_served));
        for (const char* known : {"/health", "/ping", "/health_generate", "/abort_request", "/flush_cache"}) {
            if (path == known) return Respond("");
        }
        if (path == "/v1/models") return Respond(kModels);
        if (path == "/model_info" || path == "/get_model_info") return Respond(kModelInfo + mode + "}");
        if (path == "/server_info" || path == "/get_server_info") return Respond(kServerInfo + mode + "}");
        ++counts_.other;
        return Respond(R"({"detail":"Not Found"})", "404 Not Found");
    }

    std::string Stats() const {
        char text[400];
        snprintf(text, sizeof text,
                 "{\"prefills\": %ld, \"decodes\": %ld, \"matched\": %ld, \"mismatched\": %ld, \"lonely\": %zu, "
                 "\"parked\": %zu, \"aborts\": %ld, \"events\": %ld, \"broken\": %ld, \"other\": %ld, "
                 "\"streams_peak\": %ld}",
                 counts_.prefills, counts_.decodes, counts_.matched, counts_.mismatched, lonely_.size(),
                 parked_.size(), counts_.aborts, counts_.events, counts_.broken, counts_.other, streams_peak_);
        return text;
    }

    // -- generation ------------------------------------------------------------------------------

    void Generate(Connection* c, Route route, std::string_view body) {
        std::string_view limit = route == Route::kChat ? "\"max_tokens\"" : "\"max_new_tokens\"";
        ++c->life;
        c->route = route;
        c->room = NumberAfter(body, "\"bootstrap_room\"", -1);
        c->is_stream = body.find("\"stream\":true") != body.npos || body.find("\"stream\": true") != body.npos;
        c->pace_ns = NumberAfter(body, "pace=", 0) * 1'000'000;
        c->done = 0;
        c->total = std::max(1, static_cast<int>(NumberAfter(body, limit, 16)));
        ++c->worker->num_running;
        ++c->worker->num_served;
        return c->worker->is_prefill ? Prefill(c) : Decode(c);
    }

    void Prefill(Connection* c) {
        ++counts_.prefills;
        c->total = 1;
        c->pace_ns = 0;
        int64_t room = c->room;
        Begin(c);
        if (room < 0) return;
        auto found = parked_.find(room);
        if (found == parked_.end()) {
            counts_.mismatched += !lonely_.insert(room).second;
            return;
        }
        Connection* twin = found->second;
        parked_.erase(found);
        twin->is_parked = false;
        ++counts_.matched;
        Begin(twin);
    }

    void Decode(Connection* c) {
        ++counts_.decodes;
        if (c->room < 0) return Begin(c);
        if (lonely_.erase(c->room)) {
            ++counts_.matched;
            return Begin(c);
        }
        c->is_parked = parked_.emplace(c->room, c).second;
        if (!c->is_parked) return Refuse(c);
        waits_.push_back({NowNs() + kRoomWaitNs, {c, c->life}});
    }

    void Refuse(Connection* c) {
        ++counts_.mismatched;
        End(c);
        Write(c, Respond(R"({"error":{"message":"no prefill saw this room"}})", "500 Internal Server Error"));
    }

    void Begin(Connection* c) {
        if (c->is_stream) {
            c->is_streaming = !c->worker->is_prefill;
            num_streams_ += c->is_streaming;
            streams_peak_ = std::max(streams_peak_, num_streams_);
            Write(c, StreamHead());
            if (c->fd < 0) return;
        }
        if (c->pace_ns) {
            // The engine's step after next counts the first token; one that does not stream waits for the last.
            int64_t phase = c->pace_ns * c->worker->phase / kMaxWorkers;
            int64_t step = (NowNs() - phase) / c->pace_ns + (c->is_stream ? 1 : c->total);
            timers_.push({step * c->pace_ns + phase, {c, c->life}});
        } else if (c->is_stream) {
            eager_.push_back({c, c->life});
        } else {
            Step(c);
        }
    }

    // The next token of a stream, or the answer of one that does not stream.
    void Step(Connection* c) {
        c->done = c->is_stream ? c->done + 1 : c->total;
        bool is_last = c->done == c->total;
        const Template& next =
            c->is_stream ? answers_.Event(c->route, c->done, c->total) : answers_.Whole(c->route, c->total);
        counts_.events += c->is_stream;
        bool is_stream = c->is_stream;
        if (is_last) End(c);
        WriteStamped(c, next);
        if (is_last && is_stream && c->fd >= 0) Write(c, StreamTail());
    }

    // The request is over, answered or not.
    void End(Connection* c) {
        if (c->is_parked) parked_.erase(c->room);
        num_streams_ -= c->is_streaming;
        c->is_parked = c->is_streaming = false;
        c->total = 0;
        --c->worker->num_running;
        ++c->life;
    }

    void StepEager() {
        for (size_t left = eager_.size(); left > 0; --left) {
            Ref ref = eager_.front();
            eager_.pop_front();
            if (ref.is_live()) Step(ref.connection);
            // One whose reader is slow comes back when its socket takes more: Write.
            if (ref.is_live() && ref.connection->out.empty()) eager_.push_back(ref);
        }
    }

    void StepTimers() {
        while (!timers_.empty() && timers_.top().due_ns <= NowNs()) {
            Timer timer = timers_.top();
            timers_.pop();
            if (!timer.ref.is_live()) continue;
            Connection* c = timer.ref.connection;
            Step(c);
            if (timer.ref.is_live()) timers_.push({timer.due_ns + c->pace_ns, timer.ref});
        }
    }

    void RefuseLate() {
        while (!waits_.empty()) {
            Ref ref = waits_.front().ref;
            bool is_waiting = ref.is_live() && ref.connection->is_parked;
            if (is_waiting && waits_.front().due_ns > NowNs()) return;
            waits_.pop_front();
            if (is_waiting) Refuse(ref.connection);
        }
    }

    static constexpr const char* kModels =
        R"({"object":"list","data":[{"id":"mock","object":"model","owned_by":"sglang","max_model_len":131072}]})";
    const std::string kModelInfo =
        R"({"model_path":"mock","tokenizer_path":"mock","is_generation":true,"weight_version":"default",)"
        R"("model_type":"llama","architectures":["LlamaForCausalLM"],"disaggregation_mode":)";
    const std::string kServerInfo =
        R"({"model_path":"mock","served_model_name":"mock","tokenizer_path":"mock","tp_size":1,"dp_size":1,)"
        R"("version":"0.5.23","max_running_requests":4096,"max_total_num_tokens":8388608,"page_size":16,)"
        R"("internal_states":[{"max_running_requests":4096}],"disaggregation_mode":)";

    int epoll_;
    Worker workers_[kMaxWorkers];
    std::deque<Connection> pool_;
    std::vector<Connection*> free_, closed_;
    std::deque<Ref> eager_;
    std::priority_queue<Timer> timers_;
    std::deque<Timer> waits_;                          // parked requests, oldest first
    std::unordered_set<int64_t> lonely_;               // rooms only prefill has seen
    std::unordered_map<int64_t, Connection*> parked_;  // rooms only decode has seen
    Answers answers_;
    Counts counts_;
    int64_t num_streams_ = 0, streams_peak_ = 0;
    std::string scratch_;
    char buffer_[65536];
};

}  // namespace

int main(int argc, char** argv) {
    int num_prefill = argc > 1 ? atoi(argv[1]) : 2, num_decode = argc > 2 ? atoi(argv[2]) : 2;
    if (num_prefill < 0 || num_decode < 0 || num_prefill + num_decode > kMaxWorkers) return 2;
    auto* mock = new Mock(num_prefill, num_decode);
    mock->Run();
}
