"""Static code tables of the packet format, for qcomm.reference. Written by tools/make_static_tables.py."""

# number: (num_bits, pair, code lengths as one hexadecimal digit a symbol)
STATIC_TABLES: dict[int, tuple[int, bool, str]] = {
    1: (
        7,
        False,
        "cccccccccccccccccccccccccccccccbbbbaaaa9998887777666666555555444"
        "445555556666667777888999aaaabbbbcccccccccccccccccccccccccccccccb",
    ),
    2: (
        7,
        False,
        "ccccccccccccccccccccccccccccccccccbbbbaaa99988877776666555554444"
        "4445555566667777888999aaaabbbccccccccccccccccccccccccccccccccccb",
    ),
    3: (
        7,
        False,
        "ccccccccccccccccccccccccccccccccccccccccbbbaa9988877666555544444"
        "444455556667778899aaabbccccccccccccccccccccccccccccccccccccccccb",
    ),
    4: (
        7,
        False,
        "cccccccccccccccccccccccccccccccccccccccccbbbaa998887766655544443"
        "44445556667778899aabbbcccccccccccccccccccccccccccccccccccccccccb",
    ),
    5: (
        6,
        False,
        "ccccccccccccccbbaa998776655444333444556677889aaabccccccccccccccb",
    ),
    6: (
        6,
        False,
        "ccccccccccccccbbaa998776655444333444556677889aabbcccccccccccccca",
    ),
    7: (
        6,
        False,
        "cccccccccccccccccccbaa87765543333344566789abcccccccccccccccccccb",
    ),
    8: (
        6,
        False,
        "ccccccccccccccccccccbba877544333334456789abccccccccccccccccccccb",
    ),
    9: (
        5,
        False,
        "cccccbba8765433233456789bbcccccb",
    ),
    10: (
        5,
        False,
        "ccccccba8765433233456789bcccccca",
    ),
    11: (
        5,
        False,
        "cccccccba8765332235678aaccccccca",
    ),
    12: (
        5,
        False,
        "cccccccccba864222358abcccccccccb",
    ),
    13: (
        4,
        False,
        "cba864222357abcb",
    ),
    14: (
        4,
        False,
        "cca975312469acca",
    ),
    15: (
        4,
        False,
        "ccb975312469bcc9",
    ),
    16: (
        4,
        False,
        "ccba7531246abcc8",
    ),
    17: (
        4,
        False,
        "bbb975312479baa7",
    ),
    18: (
        4,
        False,
        "bbbb8531247bbbb6",
    ),
    19: (
        4,
        False,
        "aaaa8531248aaaa6",
    ),
    20: (
        4,
        False,
        "9999853125888885",
    ),
    21: (
        4,
        False,
        "aaaa963125999994",
    ),
    22: (
        4,
        False,
        "8888873126888884",
    ),
    64: (
        4,
        True,
        "ccccccccccccccccccccccccccccccccccccccccccccccccccccbaaacccccccc"
        "cccba8889bccccccccca865579bcccccccca8544579bccccccca8543458acccc"
        "cccb9754458accccccccb975568acccccccccb98889bccccccccccbaaabccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
    ),
    65: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "ccccb999bccccccccccc97668acccccccccc964457accccccccc9642469ccccc"
        "cccca753469cccccccccca76679ccccccccccca999bcccccccccccccbccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
    ),
    66: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccaaabccccccccccca8768bcccccccccc974458bccccccccca64236accccc"
        "ccccb853479ccccccccccb8678acccccccccccba9abccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
    ),
    67: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccbabccccccccccccb8779ccccccccccca74469ccccccccccb73237bccccc"
        "ccccc95347accccccccccc9778bccccccccccccaabcccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    68: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "ccccccccccccccccccccca88bcccccccccccc8446accccccccccc84148cccccc"
        "ccccca6448cccccccccccca88acccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    69: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccb99ccccccccccccc9547bccccccccccc94149cccccb"
        "cccccb7349ccccccccccccb89acccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    70: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "ccccccccccccccccccccccaaccccccccccccca648cccccccccccca413acccccc"
        "cccccc735acccccccccccccaaccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    71: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccbcccccccccccccb647ccccccccccccb413bcccccb"
        "cccccc735bcccccccccccccbbccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    72: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccc54accccccccccccc413ccccccc"
        "cccccca35ccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccbcccccccc",
    ),
    73: (
        4,
        True,
        "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
        "cccccccccccccccccccccccbcccccccccccccc648ccccccccccccb413bccccc8"
        "cccccc835ccccccccccccccbcccccccccccccccccccccccccccccccccccccccc"
        "ccccccccccccccccccccccccccccccccccccccccccccccccccccccc8cbbbbbbb",
    ),
}

# one hexadecimal digit a token of zero runs
RUN_TABLES: tuple[str, ...] = (
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
)
RUN_TABLE_BOUNDS = (
    1276901416,
    902905650,
    638450708,
    451452825,
    319225354,
    225726412,
    159612677,
    112863206,
    79806338,
    56431603,
    39903169,
)
