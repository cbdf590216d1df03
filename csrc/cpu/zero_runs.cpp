// The static codes of zero runs, expanded for lookups.
//
// An encoder looks a run of zeros and the level behind it up at once: codeword and extra bits of every run that has a
// token, and their length above 16 bits. A decoder looks up the next bits and finds the token's length, the length of
// its codeword alone, the number of extra bits, the shortest run of the class, and the level's place.
#include "qcomm/zero_runs.h"

#include <memory>

#include "qcomm/huffman.h"

namespace qcomm {
namespace {

int length_of(char digit) { return digit <= '9' ? digit - '0' : digit - 'a' + 10; }

RunCode make_code(const char* digits) {
    RunCode code{};
    std::uint8_t lengths[kRunTokens];
    std::uint16_t codes[kRunTokens];
    for (int s = 0; s < kRunTokens; ++s) lengths[s] = static_cast<std::uint8_t>(length_of(digits[s]));
    canonical_codes(lengths, kRunTokens, codes);

    code.skip = codes[kSkipToken] | static_cast<std::uint32_t>(lengths[kSkipToken]) << 16;
    for (int run = 0; run < kSkipZeros; ++run) {
        const int number = class_of_run(run);
        const RunClass runs = run_class(number);
        for (int place = 0; place < kTokenLevels; ++place) {
            const int s = number * kTokenLevels + place;
            const std::uint32_t bits = codes[s] | static_cast<std::uint32_t>(run - runs.shortest) << lengths[s];
            code.tokens[8 * run + place] = bits | static_cast<std::uint32_t>(lengths[s] + runs.extra) << 16;
        }
    }
    // The code is complete, so every value of the next bits begins with a codeword.
    for (int s = 0; s < kRunTokens; ++s) {
        const bool skip = s == kSkipToken;
        const RunClass runs = skip ? RunClass{kSkipZeros, 0} : run_class(s / kTokenLevels);
        const std::uint32_t entry = static_cast<std::uint32_t>(
            (lengths[s] + runs.extra) | lengths[s] << 5 | runs.extra << 9 | runs.shortest << 12 |
            (skip ? 0 : (s % kTokenLevels) << 22 | static_cast<int>(kHasLevel)));
        for (std::uint32_t bits = codes[s]; bits < 1u << kMaxRunCodeLength; bits += 1u << lengths[s])
            code.entries[bits] = entry;
    }
    return code;
}

struct RunCodes {
    RunCode of[kRunTableCount];
};

}  // namespace

const RunCode& run_code(int table) {
    // On the heap: all of them are 300 KB.
    static const std::unique_ptr<const RunCodes> codes = [] {
        auto made = std::make_unique<RunCodes>();
        for (int t = 0; t < kRunTableCount; ++t) made->of[t] = make_code(kRunTables[t]);
        return made;
    }();
    return codes->of[table];
}

}  // namespace qcomm
