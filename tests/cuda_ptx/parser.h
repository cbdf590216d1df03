// PTX as text, read. What is not known ends the program with its text, since a guess would pass for a result.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "instruction.h"

namespace ptx {

// A kernel as text. It is parsed when it is first launched, as most tests need few.
struct KernelText {
    std::string name, parameters, body, file;
    int line = 0;                                  // of the body
    std::unordered_map<std::string, Bits> shared;  // addresses of the file's shared memory
};
using KernelTexts = std::map<std::string, KernelText>;  // by plain_name()

// Adds the kernels of a file's text.
void find_kernels(const std::string& text, const std::string& file, KernelTexts& kernels);
Kernel read_kernel(const KernelText& text);

// A mangled name without the hashes that nvcc puts in the place of an unnamed namespace: they depend on its options.
std::string plain_name(const std::string& mangled);

// Without the white space around it.
std::string trimmed(const std::string& text);
// Parts of a list, those in brackets and braces whole.
std::vector<std::string> split(const std::string& text, char separator);

// One kernel's parameters and body, statement by statement.
class KernelParser {
public:
    // `symbols`: addresses of the file's shared memory.
    KernelParser(Kernel& kernel, std::unordered_map<std::string, Bits> symbols)
        : kernel_(kernel), symbols_(std::move(symbols)) {}

    void parameters(const std::string& text);
    void body(const std::string& text, int first_line);

private:
    // An instruction's name in parts, without the last one where that is its type, and what it is applied to.
    struct Words {
        std::string text;
        std::vector<std::string> name, operands;
        Type type = Type::kMissing;
        bool has(const char* part) const;
    };

    // kernel_parser.cpp
    void statement(const std::string& text, int line);
    void declare_registers(const std::string& text);
    void declare_local(const std::string& text);
    int new_register();
    int constant(Bits value);
    int number(const std::string& text, Type type);
    int operand(const std::string& text, Type type);
    int special_register(const std::string& name);
    void finish();
    [[noreturn]] void unknown(const std::string& text) const;

    // instruction_parser.cpp
    using Form = void (KernelParser::*)(const Words&, Instruction&);
    static const std::unordered_map<std::string, Form> kForms;
    void instruction(const std::string& text, int line);
    bool regular(const Words& words, Instruction& i);
    void require_parts(const Words& words, std::initializer_list<const char*> known) const;
    void operands(const Words& words, Instruction& i, Op op, const char* kinds);
    void parts(Instruction& i, const std::string& text, Type type);
    void address(Instruction& i, const std::string& text);
    void multiplication(const Words& words, Instruction& i);
    void comparison(const Words& words, Instruction& i);
    void conversion(const Words& words, Instruction& i);
    void move(const Words& words, Instruction& i);
    void to_address(const Words& words, Instruction& i);
    void memory(const Words& words, Instruction& i);
    void atomic(const Words& words, Instruction& i);
    void find_bit(const Words& words, Instruction& i);
    void funnel_shift(const Words& words, Instruction& i);
    void branch(const Words& words, Instruction& i);
    void leave(const Words& words, Instruction& i);
    void barrier(const Words& words, Instruction& i);
    void fence(const Words& words, Instruction& i);
    void shuffle(const Words& words, Instruction& i);
    void vote(const Words& words, Instruction& i);
    void match(const Words& words, Instruction& i);

    Kernel& kernel_;
    std::unordered_map<std::string, Bits> symbols_;  // of parameters, shared and local memory
    std::vector<std::unordered_map<std::string, int>> scopes_ = {{}};
    std::unordered_map<Bits, int> constants_;
    std::unordered_map<std::string, int> labels_;
    std::vector<std::pair<std::size_t, std::string>> jumps_;  // branches and where they go
};

}  // namespace ptx
