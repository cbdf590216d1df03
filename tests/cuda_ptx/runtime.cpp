// The CUDA runtime's entry points that objects of nvcc call, in the place of libcudart: launches run in the
// interpreter, device memory is the host's, and a stream does its work at once.
//
// The environment, as the program's arguments are those of the emulation:
//   CUDA_PTX_FILES   folder of the kernels' PTX
//   CUDA_PTX_RACES   1: look for races
//   CUDA_PTX_COUNTS  file that gets what the kernels did, as JSON: counts.h
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "cuda_emulation.h"
#include "machine.h"
#include "parser.h"
#include "runtime.h"

namespace ptx {
namespace {

using Kernels = std::map<std::string, Kernel>;  // by plain_name()

struct Dimensions {
    unsigned x, y, z;
};
struct Configuration {
    Dimensions grid, block;
    std::size_t shared_bytes;
    void* stream;
};

std::string variable(const char* name) {
    const char* const value = std::getenv(name);
    return value == nullptr ? "" : value;
}

// A loop is what lies between a branch and its target in front of it.
std::vector<LoopCounts> loops_of(const Kernel& kernel) {
    std::vector<std::pair<int, int>> ranges;
    for (int at = 0; at < static_cast<int>(kernel.code.size()); ++at) {
        const Instruction& i = kernel.code[static_cast<std::size_t>(at)];
        if (i.op == Op::kBranch && i.target <= at) ranges.push_back({i.target, at});
    }
    std::vector<LoopCounts> loops;
    for (const auto& [begin, end] : ranges) {
        LoopCounts loop;
        loop.turns = kernel.longest[static_cast<std::size_t>(end)];
        for (int at = begin; at <= end; ++at) {
            const bool inner = std::any_of(ranges.begin(), ranges.end(), [&, b = begin, e = end](const auto& other) {
                const bool inside = other != std::pair(b, e) && other.first >= b && other.second <= e;
                return inside && other.first <= at && at <= other.second;
            });
            if (inner) continue;
            const Instruction& i = kernel.code[static_cast<std::size_t>(at)];
            const bool global = i.space == Space::kGlobal;
            loop.instructions += kernel.longest[static_cast<std::size_t>(at)];
            loop.votes += i.op == Op::kVote;
            loop.loads += i.op == Op::kLoad && global;
            loop.stores += i.op == Op::kStore && global;
        }
        if (loop.turns > 0) loops.push_back(loop);
    }
    return loops;
}

void write_counts(const std::string& path, const Kernels& kernels) {
    std::ofstream out(path);
    const char* separator = "{\n";
    for (const auto& [name, kernel] : kernels) {
        if (kernel.counts.launches == 0) continue;
        out << separator << "\"" << name << "\": ";
        kernel.counts.write_json(out);
        write_loops(kernel.longest.empty() ? std::vector<LoopCounts>{} : loops_of(kernel), out);
        separator = ",\n";
    }
    out << "\n}\n";
}

class Runtime {
public:
    Runtime() : races_(variable("CUDA_PTX_RACES") == "1"), counts_(variable("CUDA_PTX_COUNTS")) {
        const std::string folder = variable("CUDA_PTX_FILES");
        if (folder.empty()) return;
        for (const auto& entry : std::filesystem::directory_iterator(folder)) {
            if (entry.path().extension() != ".ptx") continue;
            std::stringstream text;
            text << std::ifstream(entry.path()).rdbuf();
            find_kernels(text.str(), entry.path().string(), texts_);
        }
    }
    ~Runtime() {
        if (!counts_.empty()) write_counts(counts_, kernels_);
    }

    void add(const std::string& text) {
        kernels_.clear();
        warps_.clear();
        find_kernels(text, "text", texts_);
    }

    void forget_counts() {
        for (auto& [name, kernel] : kernels_) {
            kernel.counts = {};
            kernel.longest.clear();
        }
    }

    void note_clear() { ++kernels_["cudaMemsetAsync"].counts.launches; }

    Kernel& kernel(const std::string& mangled) {
        const std::string name = plain_name(mangled);
        const auto known = kernels_.find(name);
        if (known != kernels_.end()) return known->second;
        const auto text = texts_.find(name);
        if (text == texts_.end()) stop("CUDA_PTX_FILES has no kernel " + mangled);
        return kernels_[name] = read_kernel(text->second);
    }

    void launch(Kernel& kernel, const Dimensions& grid, const Dimensions& block, void** arguments,
                std::size_t shared_bytes) {
        if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) stop("a launch in more than one dimension");
        std::vector<std::uint8_t> parameters(kernel.parameter_bytes);
        for (std::size_t n = 0; n < kernel.parameters.size(); ++n)
            std::memcpy(&parameters[kernel.parameters[n].offset], arguments[n], kernel.parameters[n].bytes);
        const Options options = {emulation::seed, races_, !counts_.empty()};
        Machine(kernel, warps_[&kernel], options, grid.x, block.x, shared_bytes, std::move(parameters)).run();
    }

private:
    const bool races_;
    const std::string counts_;
    KernelTexts texts_;
    Kernels kernels_;                                   // that have been launched
    std::map<const Kernel*, std::vector<Warp>> warps_;  // of their last launches
};

Runtime& runtime() {
    static Runtime runtime;
    return runtime;
}

// nvcc's objects register their kernels before main begins.
std::unordered_map<const void*, std::string>& registered() {
    static std::unordered_map<const void*, std::string> names;
    return names;
}

Configuration pending;

}  // namespace

void launch(const std::string& text, const std::string& name, unsigned blocks, unsigned threads,
            std::size_t shared_bytes, std::vector<void*> arguments) {
    runtime().add(text);
    runtime().launch(runtime().kernel(name), {blocks, 1, 1}, {threads, 1, 1}, arguments.data(), shared_bytes);
}

void forget_counts() { runtime().forget_counts(); }

}  // namespace ptx

using ptx::Dimensions;

extern "C" {

// AddressSanitizer is asked what is allocated, and no more: no stacks of allocations, no checks of memcpy.
const char* __asan_default_options() {
    return "detect_leaks=0:malloc_context_size=0:replace_intrin=0:quarantine_size_mb=8";
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
    ptx::registered()[host] = device;
}
unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, std::size_t shared_bytes, void* stream) {
    ptx::pending = {grid, block, shared_bytes, stream};
    return 0;
}
int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, std::size_t* shared_bytes, void* stream) {
    *grid = ptx::pending.grid;
    *block = ptx::pending.block;
    *shared_bytes = ptx::pending.shared_bytes;
    *static_cast<void**>(stream) = ptx::pending.stream;
    return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return 0;
}
int cudaLaunchKernel(const void* function, Dimensions grid, Dimensions block, void** arguments,
                     std::size_t shared_bytes, void*) {
    const auto found = ptx::registered().find(function);
    if (found == ptx::registered().end()) ptx::stop("a launch of a function that is not registered");
    ptx::runtime().launch(ptx::runtime().kernel(found->second), grid, block, arguments, shared_bytes);
    return 0;
}
int __cudaLaunchKernel(const void* function, Dimensions grid, Dimensions block, void** arguments,
                       std::size_t shared_bytes, void* stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream);
}
int cudaMemsetAsync(void* memory, int byte, std::size_t bytes, void*) {
    std::memset(memory, byte, bytes);
    ptx::runtime().note_clear();
    return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error"; }

}  // extern "C"
