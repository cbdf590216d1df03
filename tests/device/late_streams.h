// Streams whose work runs late: when something waits for it, and not before.
//
// A stream is a queue. Work at its front runs when the host waits for it or for what follows it, directly or through
// another stream's wait for an event. Nothing else runs, so a missing wait shows as work that has not happened. With a
// seed, work of random streams also runs early, one item after another of each stream.

#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>

namespace late {

// A place in a stream: the work before it has run when the stream has `done` at least `position` items.
struct Place {
    int64_t stream = 0;
    uint64_t position = 0;
};

class Streams {
public:
    // Everything that touches memory of the device holds this lock. A thread may ask for it while it has Python's own,
    // so none that has it may ask for Python's: it copies no tensor that Python knows, because torch counts those with
    // it.
    std::recursive_mutex mutex;

    int64_t create() {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        return ++created_;
    }

    void run_early(uint64_t seed) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        early_ = seed != 0;
        random_.seed(seed);
    }

    void add(int64_t stream, std::function<void()> work) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        Queue& queue = queues_[stream];
        queue.items.push_back({std::move(work), {}});
        ++queue.added;
        run_some();
    }

    Place place(int64_t stream) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        return {stream, queues_[stream].added};
    }

    // Later work of `stream` runs after what is before `place`.
    void wait(int64_t stream, Place place) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        Queue& queue = queues_[stream];
        queue.items.push_back({nullptr, place});
        ++queue.added;
        run_some();
    }

    bool has_passed(Place place) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        return queues_[place.stream].done >= place.position;
    }

    // Runs what is before `place`, and what that waits for.
    void run_to(Place place) {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        while (queues_[place.stream].done < place.position) run_front(place.stream);
    }

    void run_all() {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        for (auto& [stream, queue] : queues_) run_to({stream, queue.added});
    }

private:
    struct Item {
        std::function<void()> work;  // none for a wait
        Place waits_for;
    };
    struct Queue {
        std::deque<Item> items;
        uint64_t added = 0;
        uint64_t done = 0;
    };

    void run_front(int64_t stream) {
        Queue& queue = queues_[stream];  // a map's elements stay where they are
        Item item = std::move(queue.items.front());
        if (item.work)
            item.work();
        else
            run_to(item.waits_for);
        queue.items.pop_front();
        ++queue.done;
    }

    void run_some() {
        while (early_ && random_() % 2) {
            auto chosen = queues_.begin();
            std::advance(chosen, random_() % queues_.size());
            const Queue& queue = chosen->second;
            if (queue.items.empty()) continue;
            const Item& front = queue.items.front();
            if (front.work || has_passed(front.waits_for)) run_front(chosen->first);
        }
    }

    std::map<int64_t, Queue> queues_;
    int64_t created_ = 0;
    bool early_ = false;
    std::mt19937_64 random_;
};

}  // namespace late
