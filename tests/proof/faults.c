/* Faults in what a process writes, for LD_PRELOAD.
 *
 * Calls that change something below FAULT_ROOT are counted, and from number FAULT_AT on they fail:
 *   kill            the process dies by SIGKILL, a write half done
 *   nospace         what needs room on the disk fails with ENOSPC
 *   io              writes and fsync fail with EIO
 *   readonly        all fail with EROFS
 * FAULT_LOG names a file that gets a line for every write (w) and flush to the disk (s): the file's
 * inode and its size before, so that a loss of power can be played afterwards.
 * Read anew in every process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ROOM = 1, DATA = 2 }; /* needs room; moves data */

static pid_t owner;
static const char *root, *kind;
static long at, seen;
static int log_fd = -1;

static void setup(void) {
  if (owner == getpid()) return;
  owner = getpid();
  root = getenv("FAULT_ROOT");
  kind = getenv("FAULT_KIND");
  at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
  seen = 0;
  const char *name = getenv("FAULT_LOG");
  log_fd = name ? syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
}

static int below(const char *path) {
  setup();
  if (!root || !path) return 0;
  char full[PATH_MAX];
  if (path[0] != '/') {
    if (!getcwd(full, sizeof full)) return 0;
    size_t n = strlen(full);
    snprintf(full + n, sizeof full - n, "/%s", path);
    path = full;
  }
  return strncmp(path, root, strlen(root)) == 0;
}

static int fd_below(int fd) {
  setup();
  if (!root) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (n < 0 || path[0] != '/') return 0; /* a pipe, a socket, an event: no disk is asked */
  path[n] = 0;
  return below(path);
}

static int at_below(int dir, const char *path) {
  return path && path[0] != '/' && dir != AT_FDCWD ? fd_below(dir) : below(path);
}

static void note(char what, int fd) {
  struct stat s;
  char line[96];
  if (log_fd < 0 || fstat(fd, &s)) return;
  int n = snprintf(line, sizeof line, "%c %lu %ld\n", what, (unsigned long)s.st_ino,
                   (long)s.st_size);
  syscall(SYS_write, log_fd, line, n);
}

/* Say whether the call that is about to be made fails; 2: it dies half done. */
static int fails(int needs) {
  seen++;
  if (getenv("FAULT_COUNT")) {
    char line[32];
    int n = snprintf(line, sizeof line, "%ld\n", seen);
    int fd = syscall(SYS_openat, AT_FDCWD, getenv("FAULT_COUNT"), O_WRONLY | O_CREAT, 0644);
    syscall(SYS_write, fd, line, n);
    syscall(SYS_close, fd);
  }
  if (!at || !kind || seen < at) return 0;
  if (!strcmp(kind, "kill")) return 2;
  if (!strcmp(kind, "nospace") && (needs & ROOM)) { errno = ENOSPC; return 1; }
  if (!strcmp(kind, "io") && (needs & DATA)) { errno = EIO; return 1; }
  if (!strcmp(kind, "readonly")) { errno = EROFS; return 1; }
  return 0;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define GUARD(inside, needs, failed) \
  if (inside) { int f = fails(needs); if (f == 2) die(); if (f) return failed; }

#define OPENS(flags) (((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
  va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { MODE REAL(open);
  GUARD(OPENS(flags) && below(path), ROOM, -1); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE REAL(open64);
  GUARD(OPENS(flags) && below(path), ROOM, -1); return real(path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE REAL(openat);
  GUARD(OPENS(flags) && at_below(dir, path), ROOM, -1); return real(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE REAL(openat64);
  GUARD(OPENS(flags) && at_below(dir, path), ROOM, -1); return real(dir, path, flags, mode); }

#define WRITES(fd, n, half, whole) \
  if (fd_below(fd)) { note('w', fd); int f = fails(ROOM | DATA); \
    if (f == 2) { half; die(); } if (f) return -1; } return whole

ssize_t write(int fd, const void *data, size_t n) { REAL(write);
  WRITES(fd, n, real(fd, data, n / 2), real(fd, data, n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t o) { REAL(pwrite);
  WRITES(fd, n, real(fd, data, n / 2, o), real(fd, data, n, o)); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t o) { REAL(pwrite64);
  WRITES(fd, n, real(fd, data, n / 2, o), real(fd, data, n, o)); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev);
  WRITES(fd, n, real(fd, v, n / 2), real(fd, v, n)); }
ssize_t sendfile(int out, int in, off_t *o, size_t n) { REAL(sendfile);
  WRITES(out, n, real(out, in, o, n / 2), real(out, in, o, n)); }
ssize_t copy_file_range(int in, off64_t *i, int out, off64_t *o, size_t n, unsigned f) {
  REAL(copy_file_range);
  WRITES(out, n, real(in, i, out, o, n / 2, f), real(in, i, out, o, n, f)); }

int fsync(int fd) { REAL(fsync);
  GUARD(fd_below(fd), DATA, -1); note('s', fd); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync);
  GUARD(fd_below(fd), DATA, -1); note('s', fd); return real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate);
  GUARD(fd_below(fd), ROOM | DATA, -1); note('w', fd); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64);
  GUARD(fd_below(fd), ROOM | DATA, -1); note('w', fd); return real(fd, n); }

int rename(const char *a, const char *b) { REAL(rename);
  GUARD(below(b), 0, -1); return real(a, b); }
int renameat(int da, const char *a, int db, const char *b) { REAL(renameat);
  GUARD(at_below(db, b), 0, -1); return real(da, a, db, b); }
int link(const char *a, const char *b) { REAL(link);
  GUARD(below(b), ROOM, -1); return real(a, b); }
int symlink(const char *a, const char *b) { REAL(symlink);
  GUARD(below(b), ROOM, -1); return real(a, b); }
int unlink(const char *path) { REAL(unlink);
  GUARD(below(path), 0, -1); return real(path); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat);
  GUARD(at_below(dir, path), 0, -1); return real(dir, path, flags); }
int rmdir(const char *path) { REAL(rmdir);
  GUARD(below(path), 0, -1); return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir);
  GUARD(below(path), ROOM, -1); return real(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat);
  GUARD(at_below(dir, path), ROOM, -1); return real(dir, path, mode); }
