// Launches of PTX that a test brings along, and the counts of all launches.
#pragma once

#include <string>
#include <vector>

namespace ptx {

// Runs the kernel `name` of `text`; arguments are addresses of its parameters.
void launch(const std::string& text, const std::string& name, unsigned blocks, unsigned threads,
            std::size_t shared_bytes, std::vector<void*> arguments);

// Counts begin again, for a program whose preparations are launches, too.
void forget_counts();

}  // namespace ptx
