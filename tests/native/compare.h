// The frame of the programs that compare versions of the inner loops on random cases.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

inline std::mt19937 noise;
inline std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(noise()) % n; }

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
