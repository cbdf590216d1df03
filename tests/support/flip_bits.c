/* For LD_PRELOAD: flips one bit, once, in what a socket delivers, after the file named by FLIP_WHEN has appeared.
   Short blocks stay as they are: they are gloo's own headers, at which it ends the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LEAST_BYTES 2000

static atomic_flag flipped = ATOMIC_FLAG_INIT;

static void flip(int descriptor, unsigned char *bytes, ssize_t count) {
    struct stat about;
    const char *when = getenv("FLIP_WHEN");
    if (count < LEAST_BYTES || fstat(descriptor, &about) != 0 || !S_ISSOCK(about.st_mode)) {
        return;
    }
    if (when == NULL || access(when, F_OK) != 0 || atomic_flag_test_and_set(&flipped)) {
        return;
    }
    bytes[count / 2] ^= 4;
    fprintf(stderr, "flipped a bit of %zd bytes\n", count);
}

ssize_t read(int descriptor, void *buffer, size_t size) {
    ssize_t (*next)(int, void *, size_t) = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    ssize_t count = next(descriptor, buffer, size);
    flip(descriptor, buffer, count);
    return count;
}

ssize_t recv(int descriptor, void *buffer, size_t size, int flags) {
    ssize_t (*next)(int, void *, size_t, int) = (ssize_t(*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
    ssize_t count = next(descriptor, buffer, size, flags);
    flip(descriptor, buffer, count);
    return count;
}

ssize_t readv(int descriptor, const struct iovec *parts, int number) {
    ssize_t (*next)(int, const struct iovec *, int) =
        (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "readv");
    ssize_t count = next(descriptor, parts, number), left = count;
    for (int part = 0; part < number && left > 0; ++part) {
        ssize_t length = left < (ssize_t)parts[part].iov_len ? left : (ssize_t)parts[part].iov_len;
        flip(descriptor, parts[part].iov_base, length);
        left -= length;
    }
    return count;
}
