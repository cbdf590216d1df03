// The frame of the programs that compare versions of the inner loops on random cases.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

inline std::mt19937 noise;
inline std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(noise()) % n; }

// Damages a block's words and the positions at which its lanes start, as `kind` says; 3 and above leave them whole.
template <class Starts>
void damage_words(std::uint32_t kind, std::vector<std::uint16_t>* words, Starts* start) {
    if (kind == 0) {
        words->resize(below(3000));
        for (std::uint16_t& word : *words) word = static_cast<std::uint16_t>(noise());
        for (std::uint32_t& position : *start) position = static_cast<std::uint32_t>(noise()) >> below(20);
    } else if (kind == 1 && !words->empty()) {
        (*words)[below(static_cast<std::uint32_t>(words->size()))] ^= static_cast<std::uint16_t>(1u << below(16));
    } else if (kind == 2 && !words->empty()) {
        words->pop_back();
    }
}

// Runs `alike` as often as the first argument says, from the seed in the second. alike(&whole) compares one case, tells
// whether all versions agree, and adds to `whole` where a block was decoded to its end. Returns the exit status.
template <class F>
int compare_cases(int argc, char** argv, F alike) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s CASES SEED\n", argv[0]);
        return 2;
    }
    noise.seed(static_cast<std::uint32_t>(std::atoi(argv[2])));
    int whole = 0;
    for (int i = 0; i < std::atoi(argv[1]); ++i) {
        if (!alike(&whole)) {
            std::printf("case %d\n", i);
            return 1;
        }
    }
    std::printf("%d blocks decoded to their end\n", whole);
    return whole > 0 ? 0 : 1;
}
