// What a SGLang server would answer: bytes prepared once, per route and token.
//
// Sizes are those of SGLang 0.5.23: /generate repeats the whole text and its ids with every event, chat sends
// the new piece alone. Where a token's text would stand there is a time stamp (wire.hpp).
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "wire.hpp"

namespace bench {

enum class Route { kGenerate, kChat };

// Bytes with a place for the stamp; stamp_at is 0 when there is none.
struct Template {
    std::string bytes;
    size_t stamp_at = 0;
};

inline std::string Respond(const std::string& body, const char* status = "200 OK",
                           const char* type = "application/json") {
    return "HTTP/1.1 " + std::string(status) + "\r\ndate: Mon, 02 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n" +
           "content-length: " + std::to_string(body.size()) + "\r\ncontent-type: " + type + "\r\n\r\n" + body;
}

inline const std::string& StreamHead() {
    static const std::string head =
        "HTTP/1.1 200 OK\r\ndate: Mon, 02 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
        "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    return head;
}

inline std::string Chunk(const std::string& data) {
    char size[20];
    snprintf(size, sizeof size, "%zx\r\n", data.size());
    return size + data + "\r\n";
}

inline const std::string& StreamTail() {
    static const std::string tail = Chunk("data: [DONE]\n\n") + "0\r\n\r\n";
    return tail;
}

// /v1/loads of a worker so large that admission never holds a request back; the counts are true.
inline std::string LoadsOf(int64_t num_running, int64_t num_served) {
    std::string running = std::to_string(num_running), used = std::to_string(num_running * 32);
    std::string tokens = std::to_string(num_served * 16), busy = std::to_string(num_served * 20);
    return R"({"version":"0.5.23","dp_rank_count":1,"loads":[{"dp_rank":0,"num_running_reqs":)" + running +
           R"(,"num_waiting_reqs":0,"num_total_reqs":)" + running + R"(,"num_used_tokens":)" + used +
           R"(,"num_total_tokens":)" + used + R"(,"num_waiting_uncached_tokens":0,"max_total_num_tokens":8388608,)" +
           R"("token_usage":0.0,"gen_throughput":0.0,"cache_hit_rate":0.0,"max_running_requests":4096,)" +
           R"("total_prefill_uncached_tokens":)" + tokens + R"(,"total_prefill_busy_us":)" + busy + "}]}";
}

class Answers {
  public:
    // The event after `done` tokens of `total`, chunk framing included.
    const Template& Event(Route route, int done, int total) {
        bool is_last = done == total;
        auto key = std::make_pair(route, is_last ? -total : done);
        auto found = events_.find(key);
        if (found != events_.end()) return found->second;
        std::string data = "data: " + Document(route, done, is_last, /*is_event=*/true) + "\n\n";
        return events_.emplace(key, Stamped(Chunk(data))).first->second;
    }

    // The answer that does not stream.
    const Template& Whole(Route route, int total) {
        auto key = std::make_pair(route, total);
        auto found = wholes_.find(key);
        if (found != wholes_.end()) return found->second;
        std::string body = Document(route, total, true, /*is_event=*/false);
        return wholes_.emplace(key, Stamped(Respond(body))).first->second;
    }

  private:
    static Template Stamped(std::string bytes) {
        size_t at = bytes.find('@');
        return {std::move(bytes), at == std::string::npos ? 0 : at + 1};
    }

    static std::string Document(Route route, int done, bool is_last, bool is_event) {
        std::string stamp = "@" + std::string(kStampDigits, '0');
        std::string count = std::to_string(done);
        if (route == Route::kChat) return Chat(stamp, count, is_last, is_event, done);
        std::string text, ids;
        for (int i = 1; i < done; ++i) text += " tok";
        for (int i = 0; i < done; ++i) ids += (i ? "," : "") + std::to_string(1000 + i);
        std::string reason = is_last ? R"({"type":"length","length":)" + count + "}" : "null";
        return R"({"text":")" + text + " " + stamp + R"(","output_ids":[)" + ids +
               R"(],"meta_info":{"id":"mock","finish_reason":)" + reason +
               R"(,"prompt_tokens":16,"weight_version":"default","total_retractions":0,)" +
               R"("completion_tokens":)" + count +
               R"(,"cached_tokens":0,"cached_tokens_details":null,"dp_rank":null,"e2e_latency":0.01}})";
    }

    static std::string Chat(const std::string& stamp, const std::string& count, bool is_last, bool is_event,
                            int done) {
        std::string reason = is_last ? R"("length")" : "null";
        if (is_event) {
            return R"({"id":"mock","object":"chat.completion.chunk","created":1793613600,"model":"mock",)"
                   R"("choices":[{"index":0,"delta":{"role":null,"content":" )" +
                   stamp + R"(","reasoning_content":null,"tool_calls":null},"logprobs":null,)" +
                   R"("finish_reason":)" + reason + R"(,"matched_stop":null}],"usage":null})";
        }
        std::string text;
        for (int i = 1; i < done; ++i) text += " tok";
        return R"({"id":"mock","object":"chat.completion","created":1793613600,"model":"mock",)"
               R"("choices":[{"index":0,"message":{"role":"assistant","content":")" +
               text + " " + stamp + R"(","reasoning_content":null,"tool_calls":null},"logprobs":null,)" +
               R"("finish_reason":)" + reason + R"(,"matched_stop":null}],"usage":{"prompt_tokens":16,)" +
               R"("total_tokens":)" + std::to_string(16 + done) + R"(,"completion_tokens":)" + count +
               R"(,"prompt_tokens_details":null,"reasoning_tokens":0},"metadata":{"weight_version":)" +
               R"("default"}})";
    }

    std::map<std::pair<Route, int>, Template> events_, wholes_;
};

}  // namespace bench
