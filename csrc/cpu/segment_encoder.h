// Writes the segments of a packet one after another: their payload, and their part of the metadata. A segment may turn
// out larger than expected, so it is tried in this order, and a try that does not pay is taken back before the next:
//
//   range, single    blocks with a table of the segment's own; fixed, if that is no larger
//   sigma            blocks with a static table, or with its own if that is forecast to pay
//   either           raw, if that is no larger
//   zero runs        no payload of its own: finish() writes the blocks that all such segments share
//
// The last step is left out for a segment with a residual: blocks have updated it, so they must stand. Their loss is in
// it, and a block that does not fit its grid is raw by itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block_writer.h"
#include "codeword_counts.h"
#include "kernels.h"
#include "pair_sample.h"
#include "qcomm/block.h"
#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"
#include "qcomm/sigma_code.h"
#include "zero_runs_writer.h"

namespace qcomm {

// The record of `count` values with a quantizer.
inline SegmentRecord make_record(std::int64_t count, const Quantizer& q) {
    return {static_cast<std::uint64_t>(count), q.grid, q.num_bits, q.coding, q.table, q.p0, q.p1};
}

// Returns the most bytes of a segment's list of code lengths; 0 if it can have none.
inline std::int64_t max_lengths_bytes(const Quantizer& q) {
    // The dearest list alternates used and unused symbols: three nibbles for two.
    return is_block_coded(q.coding) && q.table == kTableOnWire ? align4(alphabet_size(q.coding, q.num_bits)) : 0;
}

// Encodes to `payload`, which must have room for encode_bound(). Preconditions of encode(): check_segment() of
// packet_encode.cpp. Records, lists, block ends and checksums are kept as vectors, since only their sizes are known
// before.
class SegmentEncoder {
public:
    SegmentEncoder(const EncodeOptions& options, std::uint8_t* payload)
        : options_(options), kernels_(kernels()), payload_(payload) {}

    // Appends a segment. The record says how it finally is, which may differ from the request.
    template <class Tr>
    void encode(Tr, const SegmentInput& in) {
        const Mark start = mark();
        Quantizer q = in.quantizer;
        if (in.values.count == 0) q = {Grid::kNone, 0, Coding::kConstant, kTableOnWire, 0.0, 0.0};
        switch (q.coding) {
            case Coding::kRaw:
                write_raw<Tr>(in);
                break;
            case Coding::kConstant:
                write_constant<Tr>(in, q.p0);
                break;
            case Coding::kFixed:
            case Coding::kSingle:
            case Coding::kPair:
                q = write_symbols(in, q);
                break;
            case Coding::kRuns:
                run_parts_.add(in);
                break;
        }
        const std::int64_t raw_cost = align4(in.values.count * item_bytes(options_.dtype)) + checksum_bytes(1);
        if (q.grid != Grid::kNone && in.residual_out == nullptr && cost_since(start) >= raw_cost) {
            rewind(start);
            write_raw<Tr>(in);
            q = {};
        }
        records.push_back(make_record(in.values.count, q));
    }

    // Writes the run blocks, behind all segments.
    void finish() {
        const std::int64_t values = run_parts_.values(), blocks = run_blocks(values, options_.steps);
        if (blocks == 0) return;
        const std::int64_t per_block = std::int64_t{4} * kLanes * options_.steps;
        const int parts = part_count(blocks, ceil_div(kValuesPerThread, per_block), options_.threads);
        std::vector<std::unique_ptr<RunWriter>> writers;
        for (int part = 0; part < parts; ++part) {
            writers.push_back(std::make_unique<RunWriter>(options_));
            writers.back()->reserve(ceil_div(blocks, parts), static_cast<std::int64_t>(run_parts_.segments.size()));
        }
        const auto room_before = [&](std::int64_t block) {
            return align4(max_run_block_bytes(run_block_begin(values, blocks, block), block));
        };
        write_in_parts(
            blocks, parts, room_before,
            [&](int part) -> RunWriter& { return *writers[static_cast<std::size_t>(part)]; },
            [&](RunWriter& writer, std::int64_t first, std::int64_t last, std::uint8_t* out) {
                writer.write(run_parts_, first, last, out);
            });
        // In the order of blocks, whatever the number of threads.
        for (const SegmentInput& segment : run_parts_.segments) {
            if (segment.sample_out != nullptr) std::fill_n(segment.sample_out, kSampleNumbers, 0.0);
        }
        for (const auto& writer : writers) {
            for (const RunWriter::PartSample& found : writer->samples) {
                double* const sums = run_parts_.segments[found.part].sample_out;
                if (sums == nullptr) continue;
                sums[0] += found.sample.values;
                sums[1] += found.sample.residuals;
                sums[2] += found.sample.count;
                sums[3] += found.is_lost ? 1.0 : 0.0;
            }
        }
    }

    std::vector<SegmentRecord> records;
    std::vector<std::uint8_t> lengths;
    std::vector<std::uint32_t> block_ends, checksums;
    std::int64_t payload_bytes = 0;
    const std::uint8_t* payload() const { return payload_; }

private:
    // The state to which a try that did not pay goes back. Residuals are not part of it.
    struct Mark {
        std::size_t lengths, block_ends, checksums;
        std::int64_t payload;
    };
    Mark mark() const { return {lengths.size(), block_ends.size(), checksums.size(), payload_bytes}; }
    void rewind(const Mark& m) {
        lengths.resize(m.lengths);
        block_ends.resize(m.block_ends);
        checksums.resize(m.checksums);
        payload_bytes = m.payload;
    }
    // Without checksums in the packet they cost nothing, which may decide for another coding.
    std::int64_t checksum_bytes(std::int64_t n) const { return options_.checksums ? 4 * n : 0; }
    std::int64_t cost_since(const Mark& m) const {
        return static_cast<std::int64_t>(lengths.size() - m.lengths) +
               4 * static_cast<std::int64_t>(block_ends.size() - m.block_ends) +
               checksum_bytes(static_cast<std::int64_t>(checksums.size() - m.checksums)) + payload_bytes - m.payload;
    }
    std::uint8_t* cursor() const { return payload_ + payload_bytes; }

    // Pads the bytes written at the cursor to 4, and moves the cursor behind them. Returns their number.
    std::int64_t advance(std::int64_t bytes) {
        const std::int64_t padded = align4(bytes);
        std::memset(cursor() + bytes, 0, static_cast<std::size_t>(padded - bytes));
        payload_bytes += padded;
        return padded;
    }
    // Ends a raw or fixed segment of `bytes` bytes at the cursor.
    void finish_pieces(std::int64_t bytes) {
        const std::uint8_t* begin = cursor();
        checksums.push_back(options_.checksums ? checksum_pieces(begin, align4(bytes), options_.threads) : 0u);
        advance(bytes);
    }

    // Without a residual and a scale values are copied, so that the bits of a NaN survive; otherwise u is stored, and
    // since nothing of it is lost the new residual is 0.
    template <class Tr>
    void write_raw(const SegmentInput& in) {
        const Reader<Tr> reader(in.values);
        const std::int64_t bytes = in.values.count * item_bytes(options_.dtype);
        std::uint8_t* const out = cursor();
        std::memset(out + bytes, 0, static_cast<std::size_t>(align4(bytes) - bytes));
        parallel_for_values(in.values.count, options_.threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                const typename Tr::Storage stored = in.values.is_adjusted()
                                                        ? Tr::narrow(reader[i])
                                                        : static_cast<const typename Tr::Storage*>(in.values.data)[i];
                std::memcpy(out + i * static_cast<std::int64_t>(sizeof(stored)), &stored, sizeof(stored));
                if (in.residual_out != nullptr) in.residual_out[i] = 0.0f;
            }
        });
        finish_pieces(bytes);
    }

    // A constant has no payload, and loses u - value. One that is not finite leaves the residual as it was.
    template <class Tr>
    void write_constant(const SegmentInput& in, double value) {
        if (in.residual_out == nullptr || !std::isfinite(value)) return;
        const Reader<Tr> reader(in.values);
        parallel_for_values(in.values.count, options_.threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i)
                in.residual_out[i] = static_cast<float>(reader[i] - static_cast<typename Tr::Arithmetic>(value));
        });
    }

    // Packs known symbols. Threads pack runs of kRun symbols, which begin and end at whole bytes.
    void write_fixed(const std::uint16_t* symbols, std::int64_t count, int num_bits) {
        const std::int64_t bytes = packed_bytes(count, num_bits);
        std::uint8_t* const out = cursor();
        std::memset(out + bytes, 0, static_cast<std::size_t>(align4(bytes) - bytes));
        const std::int64_t runs = ceil_div(count, kRun);  // each fills whole bytes
        parallel_for(runs, run_parts(count), [&](int, std::int64_t first, std::int64_t last) {
            const std::int64_t begin = first * kRun, n = std::min(last * kRun, count) - begin;
            pack_bits(symbols + begin, n, num_bits, out + packed_bytes(begin, num_bits));
        });
        finish_pieces(bytes);
    }

    // Quantizes, codes and writes a segment; returns the quantizer as it finally is (its coding or table may have
    // changed).
    Quantizer write_symbols(const SegmentInput& in, Quantizer q) {
        if (is_block_coded(q.coding) && q.table != kTableOnWire) {
            const StaticCode* code = find_static_code(q.table);
            write_blocks(in, q, code != nullptr ? &code->encode : nullptr, nullptr);
            return q;
        }
        if (samples_own_table(q.grid, q.coding, q.num_bits, in.values.count)) return write_with_sampled_table(in, q);
        // A table of its own needs the histogram first: all symbols are kept, the values are quantized once.
        // Left uninitialised: clearing them would cost a tenth of the time.
        const std::unique_ptr<std::uint16_t[]> symbols(new std::uint16_t[static_cast<std::size_t>(in.values.count)]);
        if (q.coding == Coding::kFixed) {
            for_each_run(in.values.count, [&](int part, std::int64_t begin, int n) {
                void* const scratch = writer(part).scratch(0);
                if (in.residual_out != nullptr) {
                    kernels_.quantize_residual(in.values, begin, n, q, scratch, symbols.get() + begin,
                                               in.residual_out + begin);
                } else {
                    const void* u = load_block(kernels_, in.values, begin, n, scratch);
                    kernels_.quantize(u, options_.dtype, n, q, symbols.get() + begin);
                }
            });
        } else {
            q = write_with_own_table(in, q, symbols.get());
        }
        if (q.coding == Coding::kFixed) write_fixed(symbols.get(), in.values.count, q.num_bits);
        return q;
    }

    // Writes a sigma segment with a table made of a sample, if that pays.
    Quantizer write_with_sampled_table(const SegmentInput& in, Quantizer q) {
        const PairSample sample = draw_pairs(in.values, q.num_bits, q.p1, kTablePairs, 0, options_.threads);
        const std::vector<std::uint32_t>& found = q.coding == Coding::kPair ? sample.pairs : sample.singles;
        std::vector<std::uint64_t> weights;
        weights.reserve(found.size());
        for (const std::uint32_t count : found) weights.push_back(sampled_weight(count));
        const int size = static_cast<int>(weights.size());
        std::vector<std::uint8_t> own(weights.size());
        code_lengths(weights.data(), size, length_limit(q.coding, q.num_bits), own.data());
        std::uint64_t bits = 0;
        for (std::size_t s = 0; s < own.size(); ++s) bits += weights[s] * own[s];
        const std::vector<std::uint8_t> list = pack_lengths(own.data(), size);
        bits = scale_sampled_bits(bits, q.coding, q.num_bits, in.values.count);
        EncodeTable table;
        if (table_pays(bits, list.size(), in.values.count, q)) {
            table = EncodeTable(own.data(), size);
            lengths.insert(lengths.end(), list.begin(), list.end());
        } else {
            q.table = kNoTable;
        }
        give_up_space(in.quantizer, q.table == kNoTable ? 0 : list.size());
        write_blocks(in, q, table.empty() ? nullptr : &table, nullptr);
        return q;
    }

    // Moves the payload's begin down by the space that a list of code lengths does not need: before anything is
    // written, not after.
    void give_up_space(const Quantizer& asked, std::size_t list_bytes) {
        if (payload_bytes == 0) payload_ -= max_lengths_bytes(asked) - static_cast<std::int64_t>(list_bytes);
    }

    // Quantizes a segment to `symbols` and writes it with a table of its own, if that pays.
    Quantizer write_with_own_table(const SegmentInput& in, Quantizer q, std::uint16_t* symbols) {
        const Mark start = mark();
        const int size = alphabet_size(q.coding, q.num_bits);
        std::vector<CodewordCounts> counted(static_cast<std::size_t>(run_parts(in.values.count)), CodewordCounts(q));
        // A range segment may yet fall back to fixed width, with the same symbols, so its residual is known now.
        float* const residual = is_range(q.grid) ? in.residual_out : nullptr;
        for_each_run(in.values.count, [&](int part, std::int64_t begin, int n) {
            kernels_.quantize_counted(in.values, begin, n, q, symbols + begin, &counted[static_cast<std::size_t>(part)],
                                      residual != nullptr ? residual + begin : nullptr);
        });
        // Counts are added up and the code is made by one thread: an alphabet is small beside a segment.
        std::vector<std::uint64_t> counts(static_cast<std::size_t>(size));
        for (CodewordCounts& part : counted) part.add_to(&counts);
        std::vector<std::uint8_t> own(static_cast<std::size_t>(size));
        code_lengths(counts.data(), size, length_limit(q.coding, q.num_bits), own.data());
        EncodeTable table;
        std::vector<std::uint8_t> list;
        if (is_complete(own.data(), size)) list = pack_lengths(own.data(), size);
        std::uint64_t bits = 0;
        for (std::size_t s = 0; s < counts.size(); ++s) bits += counts[s] * own[s];
        if (list.empty() || (q.grid == Grid::kSigma && !table_pays(bits, list.size(), in.values.count, q))) {
            q.table = kNoTable;  // one symbol only, or too few values
        } else {
            table = EncodeTable(own.data(), size);
            lengths.insert(lengths.end(), list.begin(), list.end());
        }
        give_up_space(in.quantizer, q.table == kNoTable ? 0 : list.size());
        write_blocks(in, q, table.empty() ? nullptr : &table, symbols);
        if (is_range(q.grid) &&
            cost_since(start) >= align4(packed_bytes(in.values.count, q.num_bits)) + checksum_bytes(1)) {
            rewind(start);
            q.coding = Coding::kFixed;
            q.table = kTableOnWire;
        }
        return q;
    }

    // Forecasts a sigma segment's size with its own table from the bits of its codewords.
    bool table_pays(std::uint64_t bits, std::size_t list_bytes, std::int64_t count, const Quantizer& q) const {
        return sigma_table_pays(bits, static_cast<std::int64_t>(list_bytes),
                                blocks_in(make_record(count, q), options_.steps), packed_bytes(count, q.num_bits));
    }

    // Calls f(part, begin, n) for runs of `count` values, in run_parts() parts.
    template <class F>
    void for_each_run(std::int64_t count, F f) {
        parallel_for(ceil_div(count, kRun), run_parts(count), [&](int part, std::int64_t first, std::int64_t last) {
            for (std::int64_t begin = first * kRun; begin < std::min(last * kRun, count); begin += kRun)
                f(part, begin, static_cast<int>(std::min<std::int64_t>(kRun, count - begin)));
        });
    }
    // How many threads the runs of `count` values are worth.
    int run_parts(std::int64_t count) { return parts_of(ceil_div(count, kRun), kRun); }

    // Writes the blocks of a segment. `known`: see BlockWriter.
    void write_blocks(const SegmentInput& in, const Quantizer& q, const EncodeTable* table,
                      const std::uint16_t* known) {
        const std::int64_t per_block = values_per_block(q.coding, options_.steps);
        const std::int64_t blocks = ceil_div(in.values.count, per_block);
        const int parts = parts_of(blocks, per_block);
        const auto room_before = [&](std::int64_t block) {
            return max_block_bytes(block * per_block, block, options_.dtype);
        };
        for (int part = 0; part < parts; ++part) writer(part).written.reserve(ceil_div(blocks, parts));
        write_in_parts(
            blocks, parts, room_before, [&](int part) -> BlockWriter& { return writer(part); },
            [&](BlockWriter& writer, std::int64_t first, std::int64_t last, std::uint8_t* out) {
                writer.write(in, q, table, known, first, last, out);
            });
    }

    // Calls write(writer, first, last, out) for parts of the blocks, each on a thread and with a writer of its own, and
    // moves their bytes together. room_before(block): the most bytes of the blocks before one.
    template <class Room, class WriterOf, class Write>
    void write_in_parts(std::int64_t blocks, int parts, const Room& room_before, const WriterOf& writer_of,
                        const Write& write) {
        parallel_for(blocks, parts, [&](int part, std::int64_t first, std::int64_t last) {
            write(writer_of(part), first, last, cursor() + room_before(first));
        });
        // The first part is in its place already; those behind it move down, in order, so none overwrites another.
        std::uint8_t* const base = cursor();
        for (int part = 0; part < parts; ++part) {
            const WrittenBlocks& written = writer_of(part).written;
            const std::int64_t first = blocks * part / parts;
            std::memmove(cursor(), base + room_before(first), static_cast<std::size_t>(written.bytes));
            for (const std::uint32_t size : written.sizes) {
                payload_bytes += 4 * std::int64_t{size};
                block_ends.push_back(static_cast<std::uint32_t>(payload_bytes / 4));
            }
            checksums.insert(checksums.end(), written.checksums.begin(), written.checksums.end());
        }
    }

    // Returns how many threads `count` units of `values` values each are worth; there is a writer for each.
    int parts_of(std::int64_t count, std::int64_t values) {
        const int parts = part_count(count, ceil_div(kValuesPerThread, values), options_.threads);
        while (static_cast<int>(writers_.size()) < parts) writers_.push_back(std::make_unique<BlockWriter>(options_));
        return parts;
    }
    BlockWriter& writer(int part) { return *writers_[static_cast<std::size_t>(part)]; }

    const EncodeOptions& options_;
    const Kernels& kernels_;
    std::uint8_t* payload_;
    std::vector<std::unique_ptr<BlockWriter>> writers_;  // one a thread
    RunParts run_parts_;
};

}  // namespace qcomm
