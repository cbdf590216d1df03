# CMake toolchain of wheels (tools/build_wheels.py): the compiler in PyPI's package ziglang. It brings its own C++
# library, which is linked into the module, and links against the symbols of an old glibc, so a wheel that is built on
# any Linux runs on nearly every other.
#
#   -DCMAKE_TOOLCHAIN_FILE=tools/zig.cmake -DQCOMM_ZIG=/path/to/zig -DQCOMM_ZIG_TARGET=aarch64-linux-gnu.2.17
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES QCOMM_ZIG QCOMM_ZIG_TARGET)
if(NOT QCOMM_ZIG OR NOT QCOMM_ZIG_TARGET MATCHES "^([a-z0-9_]+)-(linux|macos|windows)")
  message(FATAL_ERROR "tools/zig.cmake needs QCOMM_ZIG, the path of zig, and QCOMM_ZIG_TARGET, such as "
                      "x86_64-linux-gnu.2.17, got '${QCOMM_ZIG}' and '${QCOMM_ZIG_TARGET}'")
endif()
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
if(CMAKE_MATCH_2 STREQUAL "linux")
  set(CMAKE_SYSTEM_NAME Linux)
elseif(CMAKE_MATCH_2 STREQUAL "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
else()
  set(CMAKE_SYSTEM_NAME Windows)
endif()

# zig adds a sanitizer to what is not optimised.
set(CMAKE_TRY_COMPILE_CONFIGURATION Release)
set(CMAKE_CXX_COMPILER ${QCOMM_ZIG} c++ -target ${QCOMM_ZIG_TARGET})
# No debug information, no symbol table, and no path of the machine.
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
set(CMAKE_CXX_FLAGS_INIT "-g0 -ffile-prefix-map=${source}=.")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-s")
set(CMAKE_CXX_ARCHIVE_CREATE "\"${QCOMM_ZIG}\" ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "\"${QCOMM_ZIG}\" ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "\"${QCOMM_ZIG}\" ranlib <TARGET>")

# Headers of a library come from where they are named; nothing of this machine is taken for the target's.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
