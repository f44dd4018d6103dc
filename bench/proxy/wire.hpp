// What the mock worker and the load generator share: a clock, sockets, epoll, and just enough HTTP/1.1.
//
// Not a general parser: both ends are our own programs or a balancer under test, and every message is checked
// for what the bench needs (its length, its status), nothing more.
#pragma once

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <string>
#include <string_view>

namespace bench {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kForever = INT64_MAX;

inline int64_t NowNs() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * kSecond + t.tv_nsec;
}

[[noreturn]] inline void Fail(const char* what) {
    perror(what);
    exit(1);
}

// A loopback address.
inline sockaddr_in Loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

inline void SetNoDelay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

inline void Watch(int epoll, int operation, int fd, uint32_t events, void* owner) {
    epoll_event event{};
    event.events = events;
    event.data.ptr = owner;
    if (epoll_ctl(epoll, operation, fd, &event) < 0) Fail("epoll_ctl");
}

// epoll_wait with a deadline in nanoseconds; kForever waits for events alone.
inline int WaitUntil(int epoll, epoll_event* events, int capacity, int64_t deadline_ns) {
    timespec timeout{};
    timespec* limit = nullptr;
    if (deadline_ns != kForever) {
        int64_t left = deadline_ns - NowNs();
        if (left < 0) left = 0;
        timeout = {left / kSecond, left % kSecond};
        limit = &timeout;
    }
    long count = syscall(SYS_epoll_pwait2, epoll, events, capacity, limit, nullptr, 0);
    if (count < 0 && errno != EINTR) Fail("epoll_pwait2");
    return count < 0 ? 0 : static_cast<int>(count);
}

// How a message's body ends.
struct Head {
    size_t size = 0;  // bytes up to and with the empty line; 0: not complete yet
    int64_t content_length = -1;
    bool is_chunked = false;
};

inline Head ParseHead(std::string_view data) {
    Head head;
    size_t end = data.find("\r\n\r\n");
    if (end == std::string_view::npos) return head;
    head.size = end + 4;
    size_t at = data.find("\r\n") + 2;
    while (at < end) {
        const char* line = data.data() + at;
        size_t stop = data.find("\r\n", at);
        if ((line[0] | 32) == 'c' && stop - at > 15 && !strncasecmp(line, "content-length:", 15)) {
            head.content_length = strtoll(line + 15, nullptr, 10);
        } else if ((line[0] | 32) == 't' && stop - at > 25 && !strncasecmp(line, "transfer-encoding:", 18)) {
            head.is_chunked = true;
        }
        at = stop + 2;
    }
    return head;
}

// Takes "transfer-encoding: chunked" apart; bytes may come in any portions.
class ChunkReader {
  public:
    // Appends body bytes to out. Returns how much of data was used: all of it, or less at the end of the message.
    size_t Feed(std::string_view data, std::string* out) {
        size_t at = 0;
        while (at < data.size() && state_ != kDone) {
            if (state_ == kData) {
                size_t part = std::min(left_, data.size() - at);
                out->append(data.data() + at, part);
                at += part;
                left_ -= part;
                if (left_ == 0) state_ = kDataEnd;
                continue;
            }
            Take(data[at++]);
        }
        return at;
    }
    bool is_done() const { return state_ == kDone; }
    void Reset() { *this = ChunkReader(); }

  private:
    enum State { kSize, kExtension, kData, kDataEnd, kTrailer, kDone };

    void Take(char c) {
        switch (state_) {
            case kSize:
            case kExtension:
                if (c == '\n') {
                    state_ = left_ ? kData : kTrailer;
                    line_ = 0;
                } else if (c == ';') {
                    state_ = kExtension;
                } else if (state_ == kSize && c != '\r') {
                    left_ = left_ * 16 + static_cast<size_t>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
                }
                break;
            case kDataEnd:
                if (c == '\n') state_ = kSize;
                break;
            case kTrailer:
                if (c == '\n') {
                    if (line_ == 0) state_ = kDone;
                    line_ = 0;
                } else if (c != '\r') {
                    ++line_;
                }
                break;
            default:
                break;
        }
    }

    State state_ = kSize;
    size_t left_ = 0;
    size_t line_ = 0;
};

// The whole number after `"name":` in JSON text, or otherwise.
inline int64_t NumberAfter(std::string_view text, std::string_view name, int64_t otherwise) {
    size_t at = text.find(name);
    if (at == std::string_view::npos) return otherwise;
    at += name.size();
    while (at < text.size() && (text[at] == ' ' || text[at] == ':' || text[at] == '"')) ++at;
    if (at >= text.size() || text[at] < '0' || text[at] > '9') return otherwise;
    return strtoll(text.data() + at, nullptr, 10);
}

// Every event carries the time of its sending: '@' and 16 digits (ns of the shared monotonic clock).
constexpr size_t kStampDigits = 16;

inline void WriteStamp(char* digits, int64_t ns) {
    for (size_t i = kStampDigits; i-- > 0; ns /= 10) digits[i] = static_cast<char>('0' + ns % 10);
}

// The stamp in an event, or -1.
inline int64_t ReadStamp(std::string_view event) {
    size_t at = event.find('@');
    if (at == std::string_view::npos || at + 1 + kStampDigits > event.size()) return -1;
    int64_t ns = 0;
    for (size_t i = 0; i < kStampDigits; ++i) {
        char c = event[at + 1 + i];
        if (c < '0' || c > '9') return -1;
        ns = ns * 10 + (c - '0');
    }
    return ns;
}

}  // namespace bench
