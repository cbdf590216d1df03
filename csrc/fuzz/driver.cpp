// Runs a fuzz target without libFuzzer, at the speed of the processor and with any compiler: mutates the inputs of a
// corpus, as libFuzzer does, without looking at what they reach. libFuzzer finds new ground; this covers it densely.
// Counters of coverage, and the comparison of what an input reached with what others did, take two thirds of the time
// of an execution there. They also need clang, and change the code that is tested.
//
//     fuzz_decompress SECONDS RUNS SEED FINDING FOLDER...
//
// Begins with the corpus as it is. It does not grow, so that an execution does not depend on earlier ones: the same
// seed and the same files give the same inputs. Ends after SECONDS or RUNS executions, whichever comes first. An input
// that ends the process is in the file FINDING.
#include <fcntl.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
extern "C" __attribute__((weak)) std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                                                     std::size_t max_size, unsigned seed);

namespace {

constexpr std::size_t kMaxBytes = 4096;
constexpr int kHangSeconds = 20;  // of the processor, for kBatch inputs
constexpr std::uint64_t kBatch = 1 << 12, kReport = 1 << 22;

using Bytes = std::vector<std::uint8_t>;

// xorshift64*, of a state that is not 0.
class Dice {
public:
    void seed(std::uint64_t seed) { state_ = seed * 0x9E3779B97F4A7C15u | 1; }
    std::uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545F4914F6CDD1Du;
    }
    std::size_t below(std::size_t bound) { return static_cast<std::size_t>((next() >> 32) * bound >> 32); }

private:
    std::uint64_t state_ = 1;
};

// What the mutations and the handler of signals need.
Dice dice;
std::vector<Bytes> corpus;
std::uint8_t input[kMaxBytes];
std::size_t input_bytes = 0;
const char* finding = "";

// A handler of signals, which may only call what POSIX lists for them: no streams, and no memory. libFuzzer's exit
// codes.
extern "C" void keep_input(int number) {
    const int file = open(finding, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const bool kept = file >= 0 && write(file, input, input_bytes) == static_cast<ssize_t>(input_bytes);
    const auto say = [](const char* text) { return write(STDERR_FILENO, text, std::strlen(text)) > 0; };
    if (!say(number == SIGPROF ? "ERROR: a hang" : "ERROR: a crash")) _exit(1);
    if (!say(kept ? "; its input is kept\n" : "; its input cannot be kept\n")) _exit(1);
    _exit(number == SIGPROF ? 70 : 77);
}

// Longer inputs are left out, as libFuzzer's -max_len would cut them.
void load(const std::filesystem::path& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (!entry.is_regular_file() || entry.file_size() > kMaxBytes) continue;
        std::ifstream file(entry.path(), std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
}

// A number of 1, 2, 4 or 8 bytes: a little more or less, one at an end of its range, or a small one.
void change_number(std::uint8_t* data, std::size_t size) {
    std::size_t bytes = std::size_t{1} << dice.below(4);
    while (bytes > size) bytes /= 2;
    // Not only at multiples of its size: fields of a packet have no alignment.
    std::uint8_t* const at = data + dice.below(size - bytes + 1);
    std::uint64_t value = 0;
    std::memcpy(&value, at, bytes);
    const std::uint64_t delta = dice.below(33) - 16;
    switch (dice.below(4)) {
        case 0:
            value = delta;
            break;
        case 1:
            value = (std::uint64_t{1} << dice.below(8 * bytes)) + delta % 2;
            break;
        default:
            value += delta;
    }
    std::memcpy(at, &value, bytes);
}

// Moves what is behind `at` to make room for `bytes` more, or to take them away.
std::size_t insert(std::uint8_t* data, std::size_t size, std::size_t at, std::size_t bytes) {
    std::memmove(data + at + bytes, data + at, size - at);
    return size + bytes;
}
std::size_t erase(std::uint8_t* data, std::size_t size, std::size_t at, std::size_t bytes) {
    std::memmove(data + at, data + at + bytes, size - at - bytes);
    return size - bytes;
}

// One mutation of an input that has a byte or more. Most of them keep its size, since whatever moves in a packet moves
// everything behind it; numbers have the largest share, because counts and ends of blocks decide about memory.
std::size_t mutate_once(std::uint8_t* data, std::size_t size, std::size_t max_size) {
    const std::size_t at = dice.below(size), rest = size - at, room = max_size - size;
    switch (dice.below(9)) {
        case 0:
            data[at] ^= static_cast<std::uint8_t>(1u << dice.below(8));
            return size;
        case 1:
            data[at] = static_cast<std::uint8_t>(dice.next());
            return size;
        case 2:
            return erase(data, size, at, 1 + dice.below(std::min<std::size_t>(rest, 64)) % rest);
        case 3: {  // as much again of it, or of anything
            const std::size_t bytes = std::min({room, rest, 1 + dice.below(64)});
            size = insert(data, size, at, bytes);
            if (dice.below(2) == 0)
                for (std::size_t i = 0; i < bytes; ++i) data[at + i] = static_cast<std::uint8_t>(dice.next());
            return size;
        }
        case 4: {  // a part in another place
            const std::size_t to = dice.below(size);
            std::memmove(data + to, data + at, std::min(rest, 1 + dice.below(size - to)));
            return size;
        }
        case 5: {  // a part of another input
            const Bytes& other = corpus[dice.below(corpus.size())];
            if (other.empty()) return size;
            const std::size_t from = dice.below(other.size());
            std::memcpy(data + at, other.data() + from, std::min(rest, 1 + dice.below(other.size() - from)));
            return size;
        }
        default:
            change_number(data, size);
            return size;
    }
}

}  // namespace

// libFuzzer's function of this name, for the target's own mutations.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size) {
    if (size == 0) data[size++] = static_cast<std::uint8_t>(dice.next());
    return mutate_once(data, size, max_size);
}

int main(int count, char** arguments) {
    if (count < 6) {
        std::fprintf(stderr, "usage: %s SECONDS RUNS SEED FINDING FOLDER...\n", arguments[0]);
        return 2;
    }
    const double seconds = std::atof(arguments[1]);
    const std::uint64_t most = std::strtoull(arguments[2], nullptr, 10);
    dice.seed(std::strtoull(arguments[3], nullptr, 10));
    finding = arguments[4];
    for (int i = 5; i < count; ++i) load(arguments[i]);
    if (corpus.empty()) {
        std::fprintf(stderr, "%s: no inputs of up to %zu bytes there\n", arguments[0], kMaxBytes);
        return 2;
    }
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGPROF}) std::signal(number, keep_input);
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto take = [](const Bytes& base) {
        input_bytes = base.size();
        std::copy(base.begin(), base.end(), input);
    };
    std::uint64_t runs = 0;
    for (const Bytes& base : corpus) {
        take(base);
        LLVMFuzzerTestOneInput(input, input_bytes);
        ++runs;
    }
    for (; runs < most; ++runs) {
        if (runs % kBatch == 0) {
            if (elapsed() >= seconds) break;
            // Time of the process alone: a machine that has none left for it is no hang.
            const itimerval limit = {{0, 0}, {kHangSeconds, 0}};
            setitimer(ITIMER_PROF, &limit, nullptr);
        }
        if (runs % kReport == 0) {
            std::printf("%llu runs, %.0f seconds\n", static_cast<unsigned long long>(runs), elapsed());
            std::fflush(stdout);
        }
        take(corpus[dice.below(corpus.size())]);
        // Up to five, as libFuzzer does by default: several fields of an input have to fit each other.
        for (std::size_t left = 1 + dice.below(5); left > 0; --left) {
            const auto seed = static_cast<unsigned>(dice.next() >> 32);
            input_bytes = LLVMFuzzerCustomMutator != nullptr
                              ? LLVMFuzzerCustomMutator(input, input_bytes, kMaxBytes, seed)
                              : LLVMFuzzerMutate(input, input_bytes, kMaxBytes);
        }
        LLVMFuzzerTestOneInput(input, input_bytes);
    }
    const double passed = elapsed();
    std::printf("Done %llu runs in %.0f second(s), %.0f a second, of %zu inputs\n",
                static_cast<unsigned long long>(runs), passed, static_cast<double>(runs) / passed, corpus.size());
    return 0;
}
