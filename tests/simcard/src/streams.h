// Streams and events of the simulated card.
//
// A stream is a queue of jobs (copies and the filling of freed memory). With late streams a job stays in its queue
// until something waits for it: a later operation on the same stream, an event, a synchronisation. So the CPU that
// reads pinned memory too early reads what was there before. Operations other than copies run at once, after
// everything queued on their own stream.
//
// Whether a stream waited for another one is known from positions: every block of memory remembers which stream wrote
// it and when (allocator.h), every stream remembers how far it has waited for the others. What reads a block that it
// has not waited for delivers garbage, be it a copy or another operation.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace simcard {

constexpr int kMaxDevices = 8;
constexpr int64_t kEverything = std::numeric_limits<int64_t>::max();

using StreamKey = std::pair<int, int64_t>;      // device, stream; stream 0 is the default one
using Positions = std::map<StreamKey, int64_t>; // how far each stream has been waited for

// Guards everything of the card. Recursive, since a job may free memory.
inline std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

inline int n_devices = 1;
inline bool late_streams = false;
inline int64_t n_unordered_copies = 0; // copies that did not wait for their source
inline thread_local int current_device = 0;
inline thread_local int64_t current_stream[kMaxDevices] = {};

struct Job {
  int64_t position;
  std::function<void()> run;
};

struct Queue {
  std::deque<Job> jobs;
  int64_t position = 0; // of the newest operation that was given to this stream
  Positions waited;     // operations of other streams that precede whatever comes next on this one
};

inline std::map<StreamKey, Queue> queues;
inline Positions host_waited; // what the CPU has waited for precedes everything that it starts afterwards
inline int64_t n_streams = 0;

inline StreamKey here(int device) { return {device, current_stream[device]}; }

inline void merge(Positions& into, const Positions& from) {
  for (const auto& [key, position] : from) into[key] = std::max(into[key], position);
}

// Runs the jobs of a stream up to a position.
inline void run_until(StreamKey key, int64_t position) {
  Lock lock(mutex);
  auto& jobs = queues[key].jobs;
  while (!jobs.empty() && jobs.front().position <= position) {
    Job job = std::move(jobs.front());
    jobs.pop_front();
    job.run();
  }
}

// The CPU waits for a stream.
inline void synchronize(StreamKey key, int64_t position = kEverything) {
  Lock lock(mutex);
  run_until(key, position);
  auto& queue = queues[key];
  merge(host_waited, queue.waited);
  host_waited[key] = std::max(host_waited[key], std::min(position, queue.position));
}

// The CPU waits for all streams of one device, or of all of them (-1).
inline void synchronize_device(int device) {
  Lock lock(mutex);
  std::vector<StreamKey> keys;
  for (const auto& [key, _] : queues)
    if (device < 0 || key.first == device) keys.push_back(key);
  for (const auto& key : keys) synchronize(key);
}

// A new operation on a stream: its position.
inline int64_t advance(StreamKey key) {
  Lock lock(mutex);
  return ++queues[key].position;
}

inline void enqueue(StreamKey key, std::function<void()> run) {
  Lock lock(mutex);
  int64_t position = advance(key);
  if (late_streams)
    queues[key].jobs.push_back({position, std::move(run)});
  else
    run();
}

inline bool anything_queued() {
  Lock lock(mutex);
  for (const auto& [_, queue] : queues)
    if (!queue.jobs.empty()) return true;
  return false;
}

// Whether what `writer` did at `position` certainly precedes the next operation on `reader`.
inline bool precedes(StreamKey writer, int64_t position, StreamKey reader) {
  Lock lock(mutex);
  if (writer == reader) return true;
  auto found = [&](const Positions& waited) {
    auto at = waited.find(writer);
    return at != waited.end() && at->second >= position;
  };
  return found(host_waited) || found(queues[reader].waited);
}

struct Event {
  StreamKey stream{-1, 0};
  int64_t position = 0;
  Positions waited;

  void record(StreamKey key) {
    Lock lock(mutex);
    stream = key;
    position = queues[key].position;
    waited = queues[key].waited;
  }
  // What comes next on `key` comes after this event. The jobs before it may as well run now.
  void block(StreamKey key) const {
    if (stream.first < 0) return;
    Lock lock(mutex);
    run_until(stream, position);
    auto& queue = queues[key];
    merge(queue.waited, waited);
    queue.waited[stream] = std::max(queue.waited[stream], position);
  }
  void wait_on_host() const {
    if (stream.first >= 0) synchronize(stream, position);
  }
  bool done() const {
    Lock lock(mutex);
    auto at = queues.find(stream);
    return at == queues.end() || at->second.jobs.empty() || at->second.jobs.front().position > position;
  }
};

} // namespace simcard
