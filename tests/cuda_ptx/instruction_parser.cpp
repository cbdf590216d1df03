// Instructions of PTX, by the forms that their operands have.
#include <algorithm>
#include <initializer_list>

#include "parser.h"

namespace ptx {
namespace {

// Instructions with one result. Kinds of operands: t, of the instruction's type; u, a u32; p, a predicate.
struct Regular {
    const char* name;
    Op op;
    const char* kinds;
    const char* part = "";  // that the name may contain
};
constexpr Regular kRegular[] = {
    {"add", Op::kAdd, "tt", "rn"},
    {"sub", Op::kSub, "tt", "rn"},
    {"div", Op::kDiv, "tt", "rn"},
    {"rem", Op::kRem, "tt"},
    {"min", Op::kMin, "tt"},
    {"max", Op::kMax, "tt"},
    {"and", Op::kAnd, "tt"},
    {"or", Op::kOr, "tt"},
    {"xor", Op::kXor, "tt"},
    {"shl", Op::kShiftLeft, "tu"},
    {"shr", Op::kShiftRight, "tu"},
    {"neg", Op::kNegate, "t"},
    {"abs", Op::kAbs, "t"},
    {"not", Op::kNot, "t"},
    {"rcp", Op::kReciprocal, "t", "rn"},
    {"sqrt", Op::kSquareRoot, "t", "rn"},
    {"popc", Op::kPopCount, "t"},
    {"clz", Op::kLeadingZeros, "t"},
    {"brev", Op::kReverse, "t"},
    {"bfi", Op::kInsertField, "ttuu"},
    {"bfe", Op::kExtractField, "tuu"},
    {"prmt", Op::kPermute, "ttu"},
    {"lop3", Op::kLogic3, "tttu"},
    {"selp", Op::kSelect, "ttp"},
    {"fma", Op::kFma, "ttt", "rn"},
};

template <class Value>
Value one_of(const std::string& name, std::initializer_list<std::pair<const char*, Value>> known, Value otherwise) {
    for (const auto& [text, value] : known)
        if (name == text) return value;
    return otherwise;
}

constexpr int kUnknown = 255;

}  // namespace

const std::unordered_map<std::string, KernelParser::Form> KernelParser::kForms = {
    {"mul", &KernelParser::multiplication}, {"mad", &KernelParser::multiplication},
    {"setp", &KernelParser::comparison},    {"cvt", &KernelParser::conversion},
    {"mov", &KernelParser::move},           {"cvta", &KernelParser::to_address},
    {"ld", &KernelParser::memory},          {"st", &KernelParser::memory},
    {"atom", &KernelParser::atomic},        {"red", &KernelParser::atomic},
    {"bfind", &KernelParser::find_bit},     {"shf", &KernelParser::funnel_shift},
    {"bra", &KernelParser::branch},         {"ret", &KernelParser::leave},
    {"exit", &KernelParser::leave},         {"bar", &KernelParser::barrier},
    {"barrier", &KernelParser::barrier},    {"membar", &KernelParser::fence},
    {"fence", &KernelParser::fence},        {"shfl", &KernelParser::shuffle},
    {"vote", &KernelParser::vote},          {"match", &KernelParser::match},
};

bool KernelParser::Words::has(const char* part) const {
    return std::find(name.begin(), name.end(), part) != name.end();
}

void KernelParser::instruction(const std::string& text, int line) {
    Instruction i;
    i.line = line;
    i.text = text;
    std::string rest = text;
    if (rest[0] == '@') {
        const std::size_t space = rest.find_first_of(" \t");
        i.guard_negated = rest[1] == '!';
        const std::size_t begin = i.guard_negated ? 2 : 1;
        i.guard = operand(rest.substr(begin, space - begin), Type::kPredicate);
        rest = trimmed(rest.substr(space));
    }
    const std::size_t space = rest.find_first_of(" \t");
    Words words;
    words.text = text;
    words.name = split(rest.substr(0, space), '.');
    if (space != std::string::npos) words.operands = split(rest.substr(space), ',');
    words.type = type_named(words.name.back());
    if (words.type != Type::kMissing) words.name.pop_back();
    i.type = words.type;
    if (!regular(words, i)) {
        const auto form = kForms.find(words.name[0]);
        if (form == kForms.end()) unknown("instruction " + text);
        (this->*form->second)(words, i);
    }
    kernel_.code.push_back(std::move(i));
}

bool KernelParser::regular(const Words& words, Instruction& i) {
    const auto* const found = std::find_if(std::begin(kRegular), std::end(kRegular),
                                           [&](const Regular& r) { return words.name[0] == r.name; });
    if (found == std::end(kRegular)) return false;
    require_parts(words, {found->part, "b32"});
    operands(words, i, found->op, found->kinds);
    return true;
}

// A part that changes an instruction's meaning, like .ftz or .sat, must not be overlooked.
void KernelParser::require_parts(const Words& words, std::initializer_list<const char*> known) const {
    for (std::size_t n = 1; n < words.name.size(); ++n)
        if (std::find(known.begin(), known.end(), words.name[n]) == known.end()) unknown("instruction " + words.text);
}

void KernelParser::operands(const Words& words, Instruction& i, Op op, const char* kinds) {
    const std::string wanted = kinds;
    if (words.operands.size() != wanted.size() + 1 || words.type == Type::kMissing)
        unknown("instruction " + words.text);
    i.op = op;
    i.out = operand(words.operands[0], words.type);
    int* const inputs[] = {&i.a, &i.b, &i.c, &i.d};
    for (std::size_t n = 0; n < wanted.size(); ++n) {
        const Type type = wanted[n] == 't' ? words.type : wanted[n] == 'u' ? Type::kU32 : Type::kPredicate;
        *inputs[n] = operand(words.operands[n + 1], type);
    }
}

void KernelParser::parts(Instruction& i, const std::string& text, Type type) {
    const auto names = text[0] == '{' ? split(text.substr(1, text.size() - 2), ',') : std::vector{text};
    i.width = static_cast<int>(names.size());
    for (std::size_t n = 0; n < names.size(); ++n) i.parts[n] = operand(names[n], type);
}

// [%rd1+8]
void KernelParser::address(Instruction& i, const std::string& text) {
    const std::string inside = trimmed(text.substr(1, text.size() - 2));
    const std::size_t plus = inside.find('+');
    if (plus != std::string::npos) i.offset = std::stoll(trimmed(inside.substr(plus + 1)), nullptr, 0);
    i.a = operand(trimmed(inside.substr(0, plus)), Type::kU64);
}

void KernelParser::multiplication(const Words& words, Instruction& i) {
    require_parts(words, {"lo", "hi", "wide", "rn"});
    const bool adds = words.name[0] == "mad";
    if (adds && words.has("hi")) unknown("instruction " + words.text);
    if (words.has("wide")) {
        operands(words, i, adds ? Op::kMadWide : Op::kMulWide, adds ? "ttt" : "tt");
        if (adds) i.c = operand(words.operands[3], Type::kU64);
    } else {
        operands(words, i, adds ? Op::kMadLow : words.has("hi") ? Op::kMulHigh : Op::kMulLow, adds ? "ttt" : "tt");
    }
}

void KernelParser::comparison(const Words& words, Instruction& i) {
    if (words.name.size() != 2) unknown("instruction " + words.text);
    i.variant = static_cast<std::uint8_t>(one_of<int>(words.name[1],
                                                      {{"eq", kEq},
                                                       {"ne", kNe},
                                                       {"lt", kLt},
                                                       {"le", kLe},
                                                       {"gt", kGt},
                                                       {"ge", kGe},
                                                       {"lo", kLt},
                                                       {"ls", kLe},
                                                       {"hi", kGt},
                                                       {"hs", kGe},
                                                       {"equ", kEqu},
                                                       {"neu", kNeu},
                                                       {"ltu", kLtu},
                                                       {"leu", kLeu},
                                                       {"gtu", kGtu},
                                                       {"geu", kGeu},
                                                       {"nan", kNan},
                                                       {"num", kNum}},
                                                      kUnknown));
    if (i.variant == kUnknown) unknown("instruction " + words.text);
    operands(words, i, Op::kCompare, "tt");
}

// cvt.rzi.s32.f32: to the first type from the second
void KernelParser::conversion(const Words& words, Instruction& i) {
    Words target = words;
    i.from = words.type;
    i.type = target.type = type_named(words.name.back());
    target.name.pop_back();
    require_parts(target, {"rn", "rni", "rzi", "rmi", "rpi"});
    for (const std::string& part : target.name)
        i.variant = static_cast<std::uint8_t>(
            one_of<int>(part, {{"rzi", kToZero}, {"rmi", kDown}, {"rni", kToNearest}, {"rpi", kUp}}, i.variant));
    operands(target, i, Op::kConvert, "t");
    i.a = operand(words.operands[1], i.from);
}

void KernelParser::move(const Words& words, Instruction& i) {
    require_parts(words, {});
    if (words.operands.size() != 2 || words.type == Type::kMissing) unknown("instruction " + words.text);
    if (words.operands[0][0] == '{') {
        i.op = Op::kUnpack;
        i.a = operand(words.operands[1], words.type);
        parts(i, words.operands[0], Type::kU32);
    } else if (words.operands[1][0] == '{') {
        i.op = Op::kPack;
        i.out = operand(words.operands[0], words.type);
        parts(i, words.operands[1], Type::kU32);
    } else {
        operands(words, i, Op::kMove, "t");
    }
}

Space space_of(const std::string& name) {
    return one_of(name,
                  {{"global", Space::kGlobal},
                   {"shared", Space::kShared},
                   {"local", Space::kLocal},
                   {"param", Space::kParameter}},
                  Space::kGeneric);
}

// cvta.shared.u64: to a generic address; cvta.to.shared.u64: back
void KernelParser::to_address(const Words& words, Instruction& i) {
    require_parts(words, {"to", "global", "shared", "local"});
    i.variant = words.has("to") ? 1 : 0;
    i.space = space_of(words.name.back());
    operands(words, i, Op::kToAddress, "t");
}

void KernelParser::memory(const Words& words, Instruction& i) {
    require_parts(words, {"global", "shared", "local", "param", "nc", "v2", "v4"});
    if (words.operands.size() != 2 || words.type == Type::kMissing) unknown("instruction " + words.text);
    if (words.name.size() > 1) i.space = space_of(words.name[1]);
    const bool loads = words.name[0] == "ld";
    i.op = loads ? Op::kLoad : Op::kStore;
    parts(i, words.operands[loads ? 0 : 1], words.type);
    address(i, words.operands[loads ? 1 : 0]);
}

// atom has the old value as a result, red has none.
void KernelParser::atomic(const Words& words, Instruction& i) {
    require_parts(words, {"global", "shared", "relaxed", "gpu", "add", "max", "min", "or", "and", "exch", "cas"});
    const bool returns = words.name[0] == "atom";
    const std::size_t first = returns ? 1 : 0;
    const int which = one_of<int>(words.name.back(),
                                  {{"add", kAtomicAdd},
                                   {"max", kAtomicMax},
                                   {"min", kAtomicMin},
                                   {"or", kAtomicOr},
                                   {"and", kAtomicAnd},
                                   {"exch", kAtomicExchange},
                                   {"cas", kAtomicCas}},
                                  kUnknown);
    const std::size_t values = which == kAtomicCas ? 2 : 1;
    if (which == kUnknown || words.operands.size() != first + 1 + values) unknown("instruction " + words.text);
    i.op = Op::kAtomic;
    i.variant = static_cast<std::uint8_t>(which);
    for (const std::string& part : words.name)
        if (const Space space = space_of(part); space != Space::kGeneric) i.space = space;
    if (returns) i.out = operand(words.operands[0], words.type);
    address(i, words.operands[first]);
    i.b = operand(words.operands[first + 1], words.type);
    if (values == 2) i.c = operand(words.operands[first + 2], words.type);
}

void KernelParser::find_bit(const Words& words, Instruction& i) {
    require_parts(words, {"shiftamt"});
    i.variant = words.has("shiftamt") ? kFromHighest : kFromLowest;
    operands(words, i, Op::kFindBit, "t");
}

void KernelParser::funnel_shift(const Words& words, Instruction& i) {
    require_parts(words, {"l", "r", "wrap"});
    if (!words.has("wrap")) unknown("instruction " + words.text);
    i.variant = words.has("l") ? kLeft : kRight;
    operands(words, i, Op::kFunnelShift, "ttu");
}

void KernelParser::branch(const Words& words, Instruction& i) {
    require_parts(words, {"uni"});
    i.op = Op::kBranch;
    jumps_.emplace_back(kernel_.code.size(), words.operands[0]);
}

void KernelParser::leave(const Words& words, Instruction& i) {
    require_parts(words, {"uni"});
    i.op = Op::kReturn;
}

void KernelParser::barrier(const Words& words, Instruction& i) {
    if (words.has("warp")) {
        require_parts(words, {"warp", "sync"});
        i.op = Op::kWarpBarrier;
        i.d = operand(words.operands[0], Type::kU32);
    } else if (words.has("red")) {
        require_parts(words, {"red", "or", "and", "popc", "sync", "aligned"});
        if (words.operands.size() != 3 || words.operands[2][0] == '!') unknown("instruction " + words.text);
        i.op = Op::kBarrierReduce;
        i.variant = words.has("or") ? kReduceOr : words.has("and") ? kReduceAnd : kReduceCount;
        i.out = operand(words.operands[0], words.type);
        i.a = operand(words.operands[2], Type::kPredicate);
    } else {
        require_parts(words, {"sync", "aligned"});
        if (words.operands != std::vector<std::string>{"0"}) unknown("instruction " + words.text);
        i.op = Op::kBarrier;
    }
}

void KernelParser::fence(const Words& words, Instruction& i) {
    require_parts(words, {"gl", "cta", "sc", "acq_rel", "gpu"});
    i.op = Op::kFence;
}

// shfl.sync.up.b32 %r1|%p1, %r2, distance, bounds, mask
void KernelParser::shuffle(const Words& words, Instruction& i) {
    require_parts(words, {"sync", "up", "down", "bfly", "idx"});
    if (words.operands.size() != 5 || !words.has("sync")) unknown("instruction " + words.text);
    i.op = Op::kShuffle;
    i.variant = words.has("up")     ? kShuffleUp
                : words.has("down") ? kShuffleDown
                : words.has("bfly") ? kShuffleXor
                                    : kShuffleIndex;
    const auto outs = split(words.operands[0], '|');
    i.out = operand(outs[0], Type::kU32);
    if (outs.size() == 2) i.predicate_out = operand(outs[1], Type::kPredicate);
    i.a = operand(words.operands[1], Type::kU32);
    i.b = operand(words.operands[2], Type::kU32);
    i.c = operand(words.operands[3], Type::kU32);
    i.d = operand(words.operands[4], Type::kU32);
}

void KernelParser::vote(const Words& words, Instruction& i) {
    require_parts(words, {"sync", "ballot", "all", "any"});
    if (words.operands.size() != 3 || !words.has("sync") || words.operands[1][0] == '!')
        unknown("instruction " + words.text);
    i.op = Op::kVote;
    i.variant = words.has("ballot") ? kBallot : words.has("all") ? kVoteAll : kVoteAny;
    i.out = operand(words.operands[0], words.type);
    i.a = operand(words.operands[1], Type::kPredicate);
    i.d = operand(words.operands[2], Type::kU32);
}

void KernelParser::match(const Words& words, Instruction& i) {
    require_parts(words, {"any", "sync"});
    if (words.operands.size() != 3 || !words.has("any")) unknown("instruction " + words.text);
    i.op = Op::kMatch;
    i.out = operand(words.operands[0], Type::kU32);
    i.a = operand(words.operands[1], words.type);
    i.d = operand(words.operands[2], Type::kU32);
}

}  // namespace ptx
