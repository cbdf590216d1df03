// Types by name, and where the lanes of a branch meet again.
#include "instruction.h"

#include <cstdio>
#include <cstdlib>
#include <unordered_map>

namespace ptx {
namespace {

// The blocks of a kernel's code, with one more behind them for its end.
struct Graph {
    std::vector<int> first;     // instruction of each block
    std::vector<int> block_of;  // of each instruction
    std::vector<std::vector<int>> before, after;
    int end() const { return static_cast<int>(first.size()); }
};

Graph graph_of(const std::vector<Instruction>& code) {
    const std::size_t n = code.size();
    std::vector<bool> begins(n + 1, false);
    begins[0] = true;
    for (std::size_t i = 0; i < n; ++i) {
        if (code[i].op == Op::kBranch) begins[static_cast<std::size_t>(code[i].target)] = true;
        if (code[i].op == Op::kBranch || code[i].op == Op::kReturn) begins[i + 1] = true;
    }
    Graph graph;
    for (std::size_t i = 0; i < n; ++i) {
        if (begins[i]) graph.first.push_back(static_cast<int>(i));
        graph.block_of.push_back(graph.end() - 1);
    }
    graph.before.resize(graph.first.size() + 1);
    graph.after.resize(graph.first.size() + 1);
    for (int block = 0; block < graph.end(); ++block) {
        const auto join = [&](int to) {
            graph.after[static_cast<std::size_t>(block)].push_back(to);
            graph.before[static_cast<std::size_t>(to)].push_back(block);
        };
        const bool is_last = block + 1 == graph.end();
        const int behind = is_last ? static_cast<int>(n) : graph.first[static_cast<std::size_t>(block) + 1];
        const Instruction& last = code[static_cast<std::size_t>(behind) - 1];
        const bool jumps = last.op == Op::kBranch || last.op == Op::kReturn;
        if (last.op == Op::kBranch) join(graph.block_of[static_cast<std::size_t>(last.target)]);
        if (last.op == Op::kReturn) join(graph.end());
        if (!jumps || last.guard != kNone) join(block + 1);
    }
    return graph;
}

// Blocks in the order in which a depth-first search from the end, against the arrows, leaves them.
std::vector<int> postorder(const Graph& graph) {
    std::vector<int> order;
    std::vector<bool> seen(graph.before.size(), false);
    std::vector<std::pair<int, std::size_t>> path = {{graph.end(), 0}};
    seen[static_cast<std::size_t>(graph.end())] = true;
    while (!path.empty()) {
        auto& [block, next] = path.back();
        const auto& before = graph.before[static_cast<std::size_t>(block)];
        if (next == before.size()) {
            order.push_back(block);
            path.pop_back();
            continue;
        }
        const int other = before[next++];
        if (seen[static_cast<std::size_t>(other)]) continue;
        seen[static_cast<std::size_t>(other)] = true;
        path.emplace_back(other, 0);
    }
    return order;
}

}  // namespace

int bytes_of(Type type) {
    static const int bytes[] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 4, 8, 0};
    return bytes[static_cast<int>(type)];
}

Type type_named(const std::string& name) {
    static const std::unordered_map<std::string, Type> types = {
        {"pred", Type::kPredicate}, {"u8", Type::kU8},   {"b8", Type::kU8},   {"s8", Type::kS8},   {"u16", Type::kU16},
        {"b16", Type::kU16},        {"s16", Type::kS16}, {"u32", Type::kU32}, {"b32", Type::kU32}, {"s32", Type::kS32},
        {"u64", Type::kU64},        {"b64", Type::kU64}, {"s64", Type::kS64}, {"f32", Type::kF32}, {"f64", Type::kF64}};
    const auto found = types.find(name);
    return found == types.end() ? Type::kMissing : found->second;
}

// Dominators of the graph against its arrows (Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm", 2001).
void find_joins(Kernel& kernel) {
    const Graph graph = graph_of(kernel.code);
    const std::vector<int> order = postorder(graph);
    std::vector<int> number(graph.before.size(), kNone), dominator(graph.before.size(), kNone);
    for (std::size_t i = 0; i < order.size(); ++i) number[static_cast<std::size_t>(order[i])] = static_cast<int>(i);
    const auto up = [&](int& block) { block = dominator[static_cast<std::size_t>(block)]; };
    const auto number_of = [&](int block) { return number[static_cast<std::size_t>(block)]; };
    dominator[static_cast<std::size_t>(graph.end())] = graph.end();
    for (bool changed = true; changed;) {
        changed = false;
        for (std::size_t i = order.size() - 1; i-- > 0;) {  // without the end, which is last
            int meet = kNone;
            for (int next : graph.after[static_cast<std::size_t>(order[i])]) {
                if (dominator[static_cast<std::size_t>(next)] == kNone) continue;
                if (meet == kNone) meet = next;
                while (meet != next) {
                    while (number_of(meet) < number_of(next)) up(meet);
                    while (number_of(next) < number_of(meet)) up(next);
                }
            }
            int& known = dominator[static_cast<std::size_t>(order[i])];
            changed |= known != meet;
            known = meet;
        }
    }
    for (std::size_t i = 0; i < kernel.code.size(); ++i) {
        if (kernel.code[i].op != Op::kBranch) continue;
        const int block = dominator[static_cast<std::size_t>(graph.block_of[i])];
        if (block != kNone && block != graph.end()) kernel.code[i].join = graph.first[static_cast<std::size_t>(block)];
    }
}

void stop(const std::string& what) {
    std::fprintf(stderr, "cuda_ptx: %s\n", what.c_str());
    std::fflush(nullptr);
    std::_Exit(3);
}

}  // namespace ptx
