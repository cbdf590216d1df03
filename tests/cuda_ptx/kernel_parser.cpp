// Files, kernels, declarations, and operands of instructions.
#include <algorithm>
#include <sstream>

#include "parser.h"

namespace ptx {
namespace {

constexpr std::size_t kLocalAlignment = 16;

std::string without_comments(const std::string& text) {
    std::string rest;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t comment = text.find("//", at);
        rest += text.substr(at, comment - at);
        if (comment == std::string::npos) break;
        at = std::min(text.find('\n', comment), text.size());
    }
    return rest;
}

// The word that ends at `end`.
std::string word_before(const std::string& text, std::size_t end) {
    const std::size_t space = text.find_last_of(" \t", end);
    return text.substr(space + 1, end - space - 1);
}

// Names of arrays of shared memory whose size the launch gives: they all begin at its begin.
std::unordered_map<std::string, Bits> shared_symbols(const std::string& text, const std::string& file) {
    std::unordered_map<std::string, Bits> symbols;
    for (std::size_t at = 0; (at = text.find(".extern .shared", at)) != std::string::npos; ++at)
        symbols[word_before(text, text.find('[', at))] = 0;
    for (const char* space :
         {"\n.shared", "\n.const", "\n.global", "\n.visible .global", "\n.func", "\n.visible .func"})
        if (text.find(space) != std::string::npos) stop(file + " has" + space + ", which is not known here");
    return symbols;
}

// The place behind the brace that closes the one at `open`.
std::size_t closing(const std::string& text, std::size_t open) {
    int depth = 0;
    for (std::size_t at = open; at < text.size(); ++at) {
        if (text[at] == '{') ++depth;
        if (text[at] == '}' && --depth == 0) return at + 1;
    }
    stop("a kernel without an end");
}

}  // namespace

std::string trimmed(const std::string& text) {
    const std::size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (const char c : text) {
        if (c == '{' || c == '[') ++depth;
        if (c == '}' || c == ']') --depth;
        if (c == separator && depth == 0) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    for (std::string& part : parts) part = trimmed(part);
    return parts;
}

std::string plain_name(const std::string& mangled) {
    const std::string mark = "_GLOBAL__N__";
    const std::size_t at = mangled.find(mark);
    if (at == std::string::npos) return mangled;
    std::size_t digits = at;
    while (digits > 0 && mangled[digits - 1] >= '0' && mangled[digits - 1] <= '9') --digits;
    // The namespace's name is the mark, a hash, the file's length and name, and another hash.
    const std::size_t length = std::stoul(mangled.substr(digits, at - digits));
    const std::string name = mangled.substr(at, length);
    const std::size_t begin = name.find('_', mark.size()), end = name.rfind('_');
    const std::string file = name.substr(begin + 1, end - begin - 1);
    return mangled.substr(0, digits) + "{" + file.substr(file.find('_') + 1) + "}" + mangled.substr(at + length);
}

void find_kernels(const std::string& commented, const std::string& file, KernelTexts& kernels) {
    const std::string text = without_comments(commented);
    const auto symbols = shared_symbols(text, file);
    for (std::size_t at = 0; (at = text.find(".entry", at)) != std::string::npos;) {
        KernelText kernel;
        kernel.file = file;
        kernel.shared = symbols;
        std::size_t body = text.find('{', at);
        const std::size_t open = text.find('(', at), name = at + std::string(".entry").size();
        kernel.name = plain_name(trimmed(text.substr(name, std::min(open, body) - name)));
        if (open < body) {
            const std::size_t close = text.find(')', open);
            kernel.parameters = text.substr(open + 1, close - open - 1);
            body = text.find('{', close);
        }
        const std::size_t end = closing(text, body);
        kernel.body = text.substr(body + 1, end - body - 2);
        const auto lines = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(body), '\n');
        kernel.line = 1 + static_cast<int>(lines);
        kernels[kernel.name] = std::move(kernel);
        at = end;
    }
}

Kernel read_kernel(const KernelText& text) {
    Kernel kernel;
    kernel.name = text.name;
    kernel.file = text.file;
    KernelParser parser(kernel, text.shared);
    parser.parameters(text.parameters);
    parser.body(text.body, text.line);
    return kernel;
}

void KernelParser::parameters(const std::string& text) {
    for (const std::string& declaration : split(text, ',')) {
        std::istringstream words(declaration);
        std::string word, name;
        std::size_t alignment = 0, bytes = 0;
        while (words >> word) {
            if (word == ".align") {
                words >> alignment;
            } else if (word[0] != '.') {
                name = word;
            } else if (const Type type = type_named(word.substr(1)); type != Type::kMissing) {
                bytes = static_cast<std::size_t>(bytes_of(type));
            }
        }
        if (name.empty()) continue;
        if (const std::size_t bracket = name.find('['); bracket != std::string::npos) {
            bytes *= std::stoul(name.substr(bracket + 1));
            name = name.substr(0, bracket);
        }
        if (alignment == 0) alignment = bytes;
        const std::size_t offset = (kernel_.parameter_bytes + alignment - 1) / alignment * alignment;
        kernel_.parameters.push_back({bytes, offset});
        kernel_.parameter_bytes = offset + bytes;
        symbols_[name] = offset;
    }
}

// Statements end with a semicolon, labels with a colon; braces around statements are scopes of registers.
void KernelParser::body(const std::string& text, int line) {
    std::string current;
    int first_line = line;
    for (const char c : text) {
        if (c == '\n') ++line;
        const bool empty = current.empty();
        if (empty && (c == ' ' || c == '\t' || c == '\n' || c == '\r')) continue;
        if (empty && c == '{') {
            scopes_.emplace_back();
        } else if (empty && c == '}') {
            scopes_.pop_back();
        } else if (c == ';') {
            statement(trimmed(current), first_line);
            current.clear();
        } else if (c == ':' && current[0] == '$' && current.find_first_of(" \t") == std::string::npos) {
            labels_[current] = static_cast<int>(kernel_.code.size());
            current.clear();
        } else {
            if (empty) first_line = line;
            current += c;
        }
    }
    finish();
}

void KernelParser::finish() {
    std::vector<Instruction>& code = kernel_.code;
    if (code.empty() || code.back().op != Op::kReturn || code.back().guard != kNone) code.emplace_back();
    for (const auto& [at, label] : jumps_) {
        const auto found = labels_.find(label);
        if (found == labels_.end()) unknown("label " + label);
        code[at].target = found->second;
    }
    kernel_.written.assign(static_cast<std::size_t>(kernel_.registers), false);
    const auto writes = [&](int number) {
        if (number != kNone) kernel_.written[static_cast<std::size_t>(number)] = true;
    };
    for (const auto& [number, value] : kernel_.constants) writes(number);
    const SpecialRegisters& special = kernel_.special;
    for (int number : {special.thread, special.threads, special.block, special.blocks, special.lane}) writes(number);
    for (const Instruction& i : code) {
        writes(i.out);
        writes(i.predicate_out);
        if (i.op != Op::kLoad && i.op != Op::kUnpack) continue;
        for (int part : i.parts) writes(part);
    }
    find_joins(kernel_);
}

void KernelParser::statement(const std::string& text, int line) {
    if (text.empty() || text.rfind(".pragma", 0) == 0) return;
    if (text.rfind(".reg", 0) == 0) {
        declare_registers(text);
    } else if (text.rfind(".local", 0) == 0) {
        declare_local(text);
    } else if (text[0] == '.') {
        unknown(text);
    } else {
        instruction(text, line);
    }
}

// .reg .b32 %r<9>; or .reg .pred any;
void KernelParser::declare_registers(const std::string& text) {
    std::istringstream words(text);
    std::string word, names;
    words >> word >> word;
    std::getline(words, names);
    for (const std::string& name : split(names, ',')) {
        const std::size_t bracket = name.find('<');
        if (bracket == std::string::npos) {
            scopes_.back()[name] = new_register();
            continue;
        }
        const int count = std::stoi(name.substr(bracket + 1));
        for (int i = 0; i < count; ++i) scopes_.back()[name.substr(0, bracket) + std::to_string(i)] = new_register();
    }
}

// .local .align 16 .b8 __local_depot0[64];
void KernelParser::declare_local(const std::string& text) {
    const std::size_t bracket = text.find('[');
    symbols_[word_before(text, bracket)] = kernel_.local_bytes;
    const std::size_t bytes = std::stoul(text.substr(bracket + 1));
    kernel_.local_bytes += (bytes + kLocalAlignment - 1) / kLocalAlignment * kLocalAlignment;
}

int KernelParser::new_register() { return kernel_.registers++; }

int KernelParser::constant(Bits value) {
    const auto [found, is_new] = constants_.try_emplace(value, kNone);
    if (is_new) {
        found->second = new_register();
        kernel_.constants.emplace_back(found->second, value);
    }
    return found->second;
}

int KernelParser::number(const std::string& text, Type type) {
    const auto begins = [&](const char* lower, const char* upper) {
        return text.rfind(lower, 0) == 0 || text.rfind(upper, 0) == 0;
    };
    if (begins("0f", "0F") || begins("0d", "0D")) return constant(std::stoull(text.substr(2), nullptr, 16));
    Bits value = text[0] == '-' ? static_cast<Bits>(std::stoll(text, nullptr, 0)) : std::stoull(text, nullptr, 0);
    const int bytes = bytes_of(type);
    if (bytes > 0 && bytes < 8) value &= (Bits{1} << 8 * bytes) - 1;
    return constant(value);
}

int KernelParser::operand(const std::string& text, Type type) {
    if (text.empty()) unknown("an empty operand");
    if (text == "_") return kNone;
    for (std::size_t i = scopes_.size(); i-- > 0;)
        if (const auto found = scopes_[i].find(text); found != scopes_[i].end()) return found->second;
    if (text[0] == '%') return special_register(text);
    if (text[0] == '-' || (text[0] >= '0' && text[0] <= '9')) return number(text, type);
    const auto symbol = symbols_.find(text);
    if (symbol == symbols_.end()) unknown("operand " + text);
    return constant(symbol->second);
}

int KernelParser::special_register(const std::string& name) {
    SpecialRegisters& special = kernel_.special;
    const std::pair<const char*, int*> known[] = {{"%tid.x", &special.thread},
                                                  {"%ntid.x", &special.threads},
                                                  {"%ctaid.x", &special.block},
                                                  {"%nctaid.x", &special.blocks},
                                                  {"%laneid", &special.lane}};
    for (const auto& [text, number] : known) {
        if (name != text) continue;
        if (*number == kNone) *number = new_register();
        return *number;
    }
    unknown("register " + name);
}

void KernelParser::unknown(const std::string& text) const {
    stop("unknown: " + text + " in " + kernel_.name + " of " + kernel_.file);
}

}  // namespace ptx
