// SPDX-License-Identifier: Apache-2.0
// Stands between a process and its C library (LD_PRELOAD), and makes one call of the system fail: Python's, and those of
// the libraries in C++ and Rust beneath it. Only calls about files below `root` count, and allocations of at least a page.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR, MMAP, ALLOCATE, KINDS };

static char root[PATH_MAX];
static long counts[KINDS];
static int failing = -1, action, lasting;
static long failing_at;

// action: > 0 an errno, < 0 a signal; lasting: every later call of the kind fails, too.
void faults_arm(const char *below, int kind, long at, int act, int last) {
  snprintf(root, sizeof root, "%s", below);
  memset(counts, 0, sizeof counts);
  failing = kind, failing_at = at, action = act, lasting = last;
}

long faults_count(int kind) { return counts[kind]; }

static int below(const char *path) { return root[0] && strncmp(path, root, strlen(root)) == 0; }

static int fd_below(int fd) {
  char link[64], path[PATH_MAX];
  if (!root[0] || fd < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int at_below(int folder, const char *path) {
  return path && (path[0] == '/' || folder == AT_FDCWD ? below(path) : fd_below(folder));
}

// Whether the call fails, with errno set. A signal comes before the call is made.
static int fails(enum kind kind, int counted) {
  if (!counted) return 0;
  long number = ++counts[kind];
  if ((int)kind != failing || (lasting ? number < failing_at : number != failing_at)) return 0;
  if (action < 0) {
    kill(getpid(), -action);
    return 0;
  }
  errno = action;
  return 1;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define OPENING(name)                                                        \
  int name(const char *path, int flags, ...) {                               \
    va_list rest;                                                            \
    va_start(rest, flags);                                                   \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;  \
    va_end(rest);                                                            \
    return fails(OPEN, below(path)) ? -1 : REAL(name)(path, flags, mode);    \
  }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                               \
  int name(int folder, const char *path, int flags, ...) {                             \
    va_list rest;                                                                      \
    va_start(rest, flags);                                                             \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
    va_end(rest);                                                                      \
    return fails(OPEN, at_below(folder, path)) ? -1 : REAL(name)(folder, path, flags, mode); \
  }
OPENING_AT(openat)
OPENING_AT(openat64)

ssize_t read(int fd, void *to, size_t size) { return fails(READ, fd_below(fd)) ? -1 : REAL(read)(fd, to, size); }

ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
  return fails(READ, fd_below(fd)) ? -1 : REAL(pread64)(fd, to, size, at);
}

// Half of what is written arrives before a signal that ends the process does: a torn file.
ssize_t write(int fd, const void *from, size_t size) {
  int counted = fd_below(fd);
  if (counted && failing == WRITE && action < 0 && action != -SIGINT && counts[WRITE] + 1 == failing_at) REAL(write)(fd, from, size / 2);
  return fails(WRITE, counted) ? -1 : REAL(write)(fd, from, size);
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
  return fails(WRITE, fd_below(fd)) ? -1 : REAL(pwrite64)(fd, from, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  return fails(WRITE, fd_below(fd)) ? -1 : REAL(writev)(fd, parts, count);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
  return fails(WRITE, fd_below(to)) ? -1 : REAL(sendfile64)(to, from, at, size);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
  return fails(WRITE, fd_below(to)) ? -1 : REAL(copy_file_range)(from, at, to, there, size, flags);
}

int ftruncate64(int fd, off64_t size) { return fails(WRITE, fd_below(fd)) ? -1 : REAL(ftruncate64)(fd, size); }

int fsync(int fd) { return fails(FSYNC, fd_below(fd)) ? -1 : REAL(fsync)(fd); }

int fdatasync(int fd) { return fails(FSYNC, fd_below(fd)) ? -1 : REAL(fdatasync)(fd); }

int rename(const char *old, const char *new) { return fails(RENAME, below(old)) ? -1 : REAL(rename)(old, new); }

int renameat(int from, const char *old, int to, const char *new) {
  return fails(RENAME, at_below(from, old)) ? -1 : REAL(renameat)(from, old, to, new);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  return fails(RENAME, at_below(from, old)) ? -1 : REAL(renameat2)(from, old, to, new, flags);
}

int unlink(const char *path) { return fails(UNLINK, below(path)) ? -1 : REAL(unlink)(path); }

int unlinkat(int folder, const char *path, int flags) {
  return fails(UNLINK, at_below(folder, path)) ? -1 : REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) { return fails(UNLINK, below(path)) ? -1 : REAL(rmdir)(path); }

int mkdir(const char *path, mode_t mode) { return fails(MKDIR, below(path)) ? -1 : REAL(mkdir)(path, mode); }

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t start) {
  return fails(MMAP, fd_below(fd)) ? MAP_FAILED : REAL(mmap64)(at, size, protection, flags, fd, start);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t start) {
  return fails(MMAP, fd_below(fd)) ? MAP_FAILED : REAL(mmap)(at, size, protection, flags, fd, start);
}

// What torch allocates tensors with.
int posix_memalign(void **to, size_t alignment, size_t size) {
  return fails(ALLOCATE, root[0] && size >= 4096) ? ENOMEM : REAL(posix_memalign)(to, alignment, size);
}
