// Which quantizers are legal: the host's side of the rule in quantize.h, which knows the static tables.
#include "qcomm/quantize.h"

#include "qcomm/huffman.h"

namespace qcomm {

bool is_usable(const Quantizer& quantizer, DType dtype) {
    return dispatch(dtype, [&](auto traits) { return is_usable<decltype(traits)>(quantizer); });
}

// Looked up only where the table is a static one, since the first look-up expands all of them.
StaticAlphabet static_alphabet(const Quantizer& quantizer) {
    const StaticCode* code = has_static_table(quantizer) ? find_static_code(quantizer.table) : nullptr;
    return code != nullptr ? StaticAlphabet{code->coding, code->num_bits} : StaticAlphabet{};
}

// The template holds the rule; this finds its two arguments, the dtype and the static table.
QuantizerFault check(const Quantizer& quantizer, DType dtype) {
    return dispatch(dtype, [&](auto traits) { return check<decltype(traits)>(quantizer, static_alphabet(quantizer)); });
}

// A table that does not exist and one that does not fit get the same text: the remedy is the same.
const char* refusal_of(QuantizerFault fault) {
    // Without a default, so that the compiler tells of a reason that has no text.
    switch (fault) {
        case QuantizerFault::kNone:
            break;
        case QuantizerFault::kNumBits:
            return "num_bits must be 1..16 on a range or sigma grid";
        case QuantizerFault::kSigmaNumBits:
            return "num_bits must be 2..16 on a sigma grid";
        case QuantizerFault::kUnusable:
            return "the grid's parameters cannot represent the values; such a segment travels raw";
        case QuantizerFault::kFixedOnSigma:
            return "coding fixed needs a range grid";
        case QuantizerFault::kPair:
            return "coding pair needs a sigma grid with num_bits 4";
        case QuantizerFault::kRuns:
            return "coding runs needs a sigma grid with num_bits 3 and table 0";
        case QuantizerFault::kOwnCode:
            return "codes exist for num_bits <= 12; use table 255 beyond";
        case QuantizerFault::kStaticCode:
        case QuantizerFault::kStaticOnRange:
            return "no static table of this number fits the coding and num_bits";
    }
    return "";
}

}  // namespace qcomm
