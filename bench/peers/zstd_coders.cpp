// zstd and the two entropy coders inside it, Huff0 and FSE, for bench/bench_codec.py. Their inputs are blocks of at
// most 128 KiB; a stream here is, for each block, u32 bytes and the block. A block as long as its symbols is stored,
// one of a single byte repeats it.
//
// Huff0 writes its table in front of each block, as in zstd, or once: `shared` | u32 bytes of the table | table |
// blocks. The latter is what a packet of qcomm does. Histogram and table are made anew in each call.
#include <algorithm>
#include <cstdint>
#include <cstring>

extern "C" {
#define FSE_STATIC_LINKING_ONLY
#include "fse.h"
#include "hist.h"
#include "huf.h"
}
#define ZSTD_STATIC_LINKING_ONLY
#include "zstd.h"

#define QCOMM_BENCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t kBlock = HUF_BLOCKSIZE_MAX;
constexpr std::size_t kBlockBound = HUF_COMPRESSBOUND(kBlock);
constexpr unsigned kFseMaxLog = 12;

int flags() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("bmi2") ? HUF_flags_bmi2 : 0;
#else
    return 0;
#endif
}

alignas(16) std::uint32_t workspace[1 << 14];  // 64 KiB: more than any of these functions asks for

void put_u32(std::uint8_t*& at, std::size_t value) {
    const auto word = static_cast<std::uint32_t>(value);
    std::memcpy(at, &word, sizeof(word));
    at += sizeof(word);
}
std::size_t get_u32(const std::uint8_t*& at) {
    std::uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    at += sizeof(word);
    return word;
}

// code(out, symbols, n) writes a block and returns its bytes, 0 for a block to store, or an error. Returns the stream's
// bytes, or -1.
template <class Code>
std::int64_t encode_blocks(const std::uint8_t* symbols, std::size_t n, std::uint8_t* out, std::size_t capacity,
                           std::uint8_t* at, Code code) {
    for (std::size_t begin = 0; begin < n; begin += kBlock) {
        const std::size_t m = std::min(kBlock, n - begin);
        if (capacity - static_cast<std::size_t>(at - out) < sizeof(std::uint32_t) + kBlockBound) return -1;
        std::size_t bytes = code(at + sizeof(std::uint32_t), symbols + begin, m);
        if (HUF_isError(bytes)) return -1;
        if (bytes == 0 || bytes >= m) {
            bytes = m;
            std::memcpy(at + sizeof(std::uint32_t), symbols + begin, m);
        }
        put_u32(at, bytes);
        at += bytes;
    }
    return at - out;
}

// decode(symbols, n, block, bytes) returns n.
template <class Decode>
bool decode_blocks(const std::uint8_t* at, std::uint8_t* symbols, std::size_t n, Decode decode) {
    for (std::size_t begin = 0; begin < n; begin += kBlock) {
        const std::size_t m = std::min(kBlock, n - begin), bytes = get_u32(at);
        if (bytes == m) {
            std::memcpy(symbols + begin, at, m);
        } else if (bytes == 1) {
            std::memset(symbols + begin, *at, m);
        } else if (decode(symbols + begin, m, at, bytes) != m) {
            return false;
        }
        at += bytes;
    }
    return true;
}

// Writes the table of all symbols; 0 when there is none.
std::size_t write_table(const std::uint8_t* symbols, std::size_t n, HUF_CElt* table, std::uint8_t* out) {
    unsigned counts[HUF_SYMBOLVALUE_MAX + 1], most = HUF_SYMBOLVALUE_MAX;
    const std::size_t largest = HIST_count_wksp(counts, &most, symbols, n, workspace, sizeof(workspace));
    if (HIST_isError(largest) || largest == n) return 0;
    const unsigned limit =
        HUF_optimalTableLog(HUF_TABLELOG_DEFAULT, n, most, workspace, sizeof(workspace), table, counts, flags());
    const std::size_t bits = HUF_buildCTable_wksp(table, counts, most, limit, workspace, sizeof(workspace));
    if (HUF_isError(bits)) return 0;
    const std::size_t bytes = HUF_writeCTable_wksp(out, HUF_CTABLEBOUND, table, most, static_cast<unsigned>(bits),
                                                   workspace, sizeof(workspace));
    return HUF_isError(bytes) ? 0 : bytes;
}

}  // namespace

QCOMM_BENCH_EXPORT std::int64_t coder_bound(std::int64_t n) {
    const auto block = static_cast<std::int64_t>(sizeof(std::uint32_t) + kBlockBound);
    return (n / static_cast<std::int64_t>(kBlock) + 2) * block;
}

// streams: 1 or 4 in a block. Returns the bytes written, or -1.
QCOMM_BENCH_EXPORT std::int64_t huff0_encode(const std::uint8_t* symbols, std::int64_t count, int streams, bool shared,
                                             std::uint8_t* out, std::int64_t capacity) {
    static HUF_CElt table[HUF_CTABLE_SIZE_ST(HUF_SYMBOLVALUE_MAX)];
    const auto n = static_cast<std::size_t>(count), space = static_cast<std::size_t>(capacity);
    std::uint8_t* at = out;
    *at++ = shared;
    if (!shared) {
        const auto code = streams == 4 ? HUF_compress4X_repeat : HUF_compress1X_repeat;
        return encode_blocks(symbols, n, out, space, at,
                             [=](std::uint8_t* to, const std::uint8_t* from, std::size_t m) {
                                 HUF_repeat repeat = HUF_repeat_none;
                                 return code(to, kBlockBound, from, m, HUF_SYMBOLVALUE_MAX, HUF_TABLELOG_DEFAULT,
                                             workspace, sizeof(workspace), table, &repeat, flags());
                             });
    }
    const std::size_t bytes = write_table(symbols, n, table, at + sizeof(std::uint32_t));
    if (bytes == 0) return -1;
    put_u32(at, bytes);
    const auto code = streams == 4 ? HUF_compress4X_usingCTable : HUF_compress1X_usingCTable;
    return encode_blocks(symbols, n, out, space, at + bytes,
                         [=](std::uint8_t* to, const std::uint8_t* from, std::size_t m) {
                             return code(to, kBlockBound, from, m, table, flags());
                         });
}

// symbols_at_once: 1 or 2, the decoders X1 and X2.
QCOMM_BENCH_EXPORT bool huff0_decode(const std::uint8_t* packed, std::int64_t count, int streams, int symbols_at_once,
                                     std::uint8_t* symbols) {
    HUF_CREATE_STATIC_DTABLEX1(table1, HUF_TABLELOG_MAX);
    HUF_CREATE_STATIC_DTABLEX2(table2, HUF_TABLELOG_MAX);
    HUF_DTable* const table = symbols_at_once == 2 ? table2 : table1;
    const auto read = symbols_at_once == 2 ? HUF_readDTableX2_wksp : HUF_readDTableX1_wksp;
    const auto decode = streams == 4 ? HUF_decompress4X_usingDTable : HUF_decompress1X_usingDTable;
    const std::uint8_t* at = packed;
    const bool shared = *at++ != 0;
    if (shared) {
        const std::size_t bytes = get_u32(at);
        if (HUF_isError(read(table, at, bytes, workspace, sizeof(workspace), flags()))) return false;
        at += bytes;
    }
    return decode_blocks(at, symbols, static_cast<std::size_t>(count),
                         [=](std::uint8_t* to, std::size_t m, const std::uint8_t* from, std::size_t bytes) {
                             std::size_t skip = 0;
                             if (!shared) skip = read(table, from, bytes, workspace, sizeof(workspace), flags());
                             return HUF_isError(skip) ? skip : decode(to, m, from + skip, bytes - skip, table, flags());
                         });
}

QCOMM_BENCH_EXPORT std::int64_t fse_encode(const std::uint8_t* symbols, std::int64_t count, std::uint8_t* out,
                                           std::int64_t capacity) {
    const auto code = [](std::uint8_t* to, const std::uint8_t* from, std::size_t m) -> std::size_t {
        static FSE_CTable table[FSE_CTABLE_SIZE_U32(kFseMaxLog, HUF_SYMBOLVALUE_MAX)];
        unsigned counts[HUF_SYMBOLVALUE_MAX + 1], most = HUF_SYMBOLVALUE_MAX;
        short normalized[HUF_SYMBOLVALUE_MAX + 1];
        const std::size_t largest = HIST_count_wksp(counts, &most, from, m, workspace, sizeof(workspace));
        if (HIST_isError(largest)) return largest;
        if (largest == m) {
            *to = *from;
            return 1;
        }
        const unsigned wanted = FSE_optimalTableLog(0, m, most);  // 0: zstd's default
        const std::size_t log = FSE_normalizeCount(normalized, wanted, counts, m, most, 1);
        if (FSE_isError(log)) return log;
        const std::size_t head = FSE_writeNCount(to, kBlockBound, normalized, most, static_cast<unsigned>(log));
        if (FSE_isError(head)) return head;
        const std::size_t built =
            FSE_buildCTable_wksp(table, normalized, most, static_cast<unsigned>(log), workspace, sizeof(workspace));
        if (FSE_isError(built)) return built;
        const std::size_t bytes = FSE_compress_usingCTable(to + head, kBlockBound - head, from, m, table);
        return bytes == 0 || FSE_isError(bytes) ? bytes : head + bytes;
    };
    return encode_blocks(symbols, static_cast<std::size_t>(count), out, static_cast<std::size_t>(capacity), out, code);
}

QCOMM_BENCH_EXPORT bool fse_decode(const std::uint8_t* packed, std::int64_t count, std::uint8_t* symbols) {
    return decode_blocks(packed, symbols, static_cast<std::size_t>(count),
                         [](std::uint8_t* to, std::size_t m, const std::uint8_t* from, std::size_t bytes) {
                             return FSE_decompress_wksp_bmi2(to, m, from, bytes, kFseMaxLog, workspace,
                                                             sizeof(workspace), (flags() & HUF_flags_bmi2) != 0);
                         });
}

// zstd itself, with contexts that are kept.
QCOMM_BENCH_EXPORT std::int64_t zstd_encode(const void* data, std::int64_t bytes, int level, void* out,
                                            std::int64_t capacity) {
    static ZSTD_CCtx* context = ZSTD_createCCtx();
    const std::size_t size = ZSTD_compressCCtx(context, out, static_cast<std::size_t>(capacity), data,
                                               static_cast<std::size_t>(bytes), level);
    return ZSTD_isError(size) ? -1 : static_cast<std::int64_t>(size);
}

QCOMM_BENCH_EXPORT bool zstd_decode(const void* packed, std::int64_t packed_bytes, void* data, std::int64_t bytes) {
    static ZSTD_DCtx* context = ZSTD_createDCtx();
    return ZSTD_decompressDCtx(context, data, static_cast<std::size_t>(bytes), packed,
                               static_cast<std::size_t>(packed_bytes)) == static_cast<std::size_t>(bytes);
}

QCOMM_BENCH_EXPORT const char* coders_version() { return ZSTD_versionString(); }
