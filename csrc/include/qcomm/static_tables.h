// Written by tools/make_static_tables.py, which describes the model behind it.
// Part of the wire format: entries never change.
#pragma once

#include <cstdint>

namespace qcomm {

struct StaticTable {
    std::uint8_t id;
    std::uint8_t num_bits;
    bool pair;
    float step;           // in units of the RMS: what the table was made for
    const char* lengths;  // one hexadecimal digit a symbol
};

// clang-format off
inline constexpr StaticTable kStaticTables[] = {
    {1, 7, false, 0.105112052F,
     "cccccccccccccccccccccccccccccccbbbbaaaa9998887777666666555555444"
     "445555556666667777888999aaaabbbbcccccccccccccccccccccccccccccccb"},
    {2, 7, false, 0.125F,
     "ccccccccccccccccccccccccccccccccccbbbbaaa99988877776666555554444"
     "4445555566667777888999aaaabbbccccccccccccccccccccccccccccccccccb"},
    {3, 7, false, 0.148650889F,
     "ccccccccccccccccccccccccccccccccccccccccbbbaa9988877666555544444"
     "444455556667778899aaabbccccccccccccccccccccccccccccccccccccccccb"},
    {4, 7, false, 0.176776695F,
     "cccccccccccccccccccccccccccccccccccccccccbbbaa998887766655544443"
     "44445556667778899aabbbcccccccccccccccccccccccccccccccccccccccccb"},
    {5, 6, false, 0.210224104F,
     "ccccccccccccccbbaa998776655444333444556677889aaabccccccccccccccb"},
    {6, 6, false, 0.25F,
     "ccccccccccccccbbaa998776655444333444556677889aabbcccccccccccccca"},
    {7, 6, false, 0.297301779F,
     "cccccccccccccccccccbaa87765543333344566789abcccccccccccccccccccb"},
    {8, 6, false, 0.353553391F,
     "ccccccccccccccccccccbba877544333334456789abccccccccccccccccccccb"},
    {9, 5, false, 0.420448208F,
     "cccccbba8765433233456789bbcccccb"},
    {10, 5, false, 0.5F,
     "ccccccba8765433233456789bcccccca"},
    {11, 5, false, 0.594603558F,
     "cccccccba8765332235678aaccccccca"},
    {12, 5, false, 0.707106781F,
     "cccccccccba864222358abcccccccccb"},
    {13, 4, false, 0.840896415F,
     "cba864222357abcb"},
    {14, 4, false, 1.0F,
     "cca975312469acca"},
    {15, 4, false, 1.18920712F,
     "ccb975312469bcc9"},
    {16, 4, false, 1.41421356F,
     "ccba7531246abcc8"},
    {17, 4, false, 1.68179283F,
     "bbb975312479baa7"},
    {18, 4, false, 2.0F,
     "bbbb8531247bbbb6"},
    {19, 4, false, 2.37841423F,
     "aaaa8531248aaaa6"},
    {20, 4, false, 2.82842712F,
     "9999853125888885"},
    {21, 4, false, 3.36358566F,
     "aaaa963125999994"},
    {22, 4, false, 4.0F,
     "8888873126888884"},
    {64, 4, true, 0.840896415F,
     "ccccccccccccccccccccccccccccccccccccccccccccccccccccbaaacccccccc"
     "cccba8889bccccccccca865579bcccccccca8544579bccccccca8543458acccc"
     "cccb9754458accccccccb975568acccccccccb98889bccccccccccbaaabccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"},
    {65, 4, true, 1.0F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "ccccb999bccccccccccc97668acccccccccc964457accccccccc9642469ccccc"
     "cccca753469cccccccccca76679ccccccccccca999bcccccccccccccbccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"},
    {66, 4, true, 1.18920712F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccaaabccccccccccca8768bcccccccccc974458bccccccccca64236accccc"
     "ccccb853479ccccccccccb8678acccccccccccba9abccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"},
    {67, 4, true, 1.41421356F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccbabccccccccccccb8779ccccccccccca74469ccccccccccb73237bccccc"
     "ccccc95347accccccccccc9778bccccccccccccaabcccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {68, 4, true, 1.68179283F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "ccccccccccccccccccccca88bcccccccccccc8446accccccccccc84148cccccc"
     "ccccca6448cccccccccccca88acccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {69, 4, true, 2.0F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccb99ccccccccccccc9547bccccccccccc94149cccccb"
     "cccccb7349ccccccccccccb89acccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {70, 4, true, 2.37841423F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "ccccccccccccccccccccccaaccccccccccccca648cccccccccccca413acccccc"
     "cccccc735acccccccccccccaaccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {71, 4, true, 2.82842712F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccbcccccccccccccb647ccccccccccccb413bcccccb"
     "cccccc735bcccccccccccccbbccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {72, 4, true, 3.36358566F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccc54accccccccccccc413ccccccc"
     "cccccca35ccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc"},
    {73, 4, true, 4.0F,
     "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
     "cccccccccccccccccccccccbcccccccccccccc648ccccccccccccb413bccccc8"
     "cccccc835ccccccccccccccbcccccccccccccccccccccccccccccccccccccccc"
     "ccccccccccccccccccccccccccccccccccccccccccccccccccccccc8cbbbbbbb"},
};

// Codes of zero runs, one digit a token: of table t 2^(-(t + 3) / 2) of the values are not zero.
inline constexpr const char* kRunTables[12] = {
    "b8338bb8338bb9449bba54abbb55abbb66bbbb66bbbb77bbbb77bbbb88bbbb99bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "b8338bb9449bb9449bba44abba55abbb55abbb66bbbb66bbbb66bbbb77bbbb77bbbb88bbbb88bbbbaabbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "b9449bb9449bb9449bba44abba55abba55abbb55abbb66bbba55abbb66bbbb66bbbb77bbbb76bbbb88bbbb99bbbbaabbbbbb"
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "b9449bb9449bb9559bba55abba55abba55abba55abba65abba55abba55abbb66abbb66bbba66abbb66bbbb77bbbb88bbbb88"
    "bbbb99bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "ba55abba55abba55abba55abba55abba55abbb55abbb66bbba55abba55abba55abbb66bbba55abbb65bbbb66bbbb77bbbb66"
    "bbbb77bbbb88bbbb99bbbbaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "ba55abbb55abbb55bbbb55bbbb66bbbb66bbbb66bbbb66bbba55abba55abbb55bbbb66bbba55abba55abbb66bbbb66bbbb55"
    "bbbb66bbbb77bbbb88bbbb88bbbb99bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "bb66bbbb66bbbb66bbbb66bbbb66bbbb66bbbb66bbbb66bbba55abba55abbb55abbb66bbba55abba55abba55abbb66bbba55"
    "abbb65bbbb66bbbb76bbbb66bbbb77bbbb88bbbb99bbbbaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "bb66bbbb66bbbb66bbbb66bbbb66bbbb66bbbb66bbbb66bbbb66abbb66bbbb66bbbb66bbba55abba55abba55abba66abba55"
    "abba55abba66abbb66bbba55abbb66bbbb77bbbb88bbbb88bbbb99bbbbaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "bb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb66bbbb66bbbb66bbbb66bbbb55abbb55bbbb55bbbb66bbba55"
    "abba55abbb55bbbb66bbba55abbb55bbbb66bbbb77bbbb66bbbb77bbbb88bbbb99bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "bb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb77bbbb66bbbb66bbbb66bbbb76bbbb66bbbb66bbbb66bbbb66bbba55"
    "abba55abbb55abbb66bbba55abba55abbb65bbbb66bbbb55bbbb66bbbb77bbbb88bbbb88bbbb99bbbbaabbbbbbbbbbbbbbbb"
    "bbbbbbbbbbbbbbbbb",
    "bb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb77bbbb77bbbb77bbbb77bbbb66bbbb66bbbb66bbbb66bbba55"
    "abba55abbb55bbbb66bbba55abba55abba55abbb66bbba55abbb55bbbb66bbbb66bbbb77bbbb88bbbb88bbbb99bbbb99bbbb"
    "a9bbbbaabbbbbbbb8",
    "bb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb88bbbb77bbbb77bbbb77bbbb77bbbb66bbbb66bbbb66bbbb76bbbb66"
    "bbbb66bbbb66bbbb66bbba55abba55abbb55bbbb66bbba55abba55abbb55bbbb66bbbb66bbbb77bbbb77bbbb77bbbb88bbbb"
    "88bbbb88bbbb99bb6",
};
// Table t + 1 is the nearer one where the share, in units of 2^-32, is below bound t.
inline constexpr std::uint32_t kRunTableBounds[11] = {
    1276901416u, 902905650u, 638450708u, 451452825u, 319225354u, 225726412u, 159612677u, 112863206u, 79806338u, 56431603u, 39903169u};
// clang-format on

}  // namespace qcomm
