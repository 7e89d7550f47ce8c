/* Failpoints below any program: counts its operations on files of one directory and on IP sockets, and dies (SIGKILL),
 * or fails, at the chosen one. Preloaded with LD_PRELOAD, so that it reaches Python, SQLite and a frozen executable alike.
 *
 *   XIM_FAIL_DIR   files below it count
 *   XIM_FAIL_LOG   file to which every counted operation is appended: "<number> <operation> <what>"
 *   XIM_FAIL_AT    number of the operation, from 1; 0 or unset: none
 *   XIM_FAIL_ONLY  "files": sockets do not count
 *   XIM_FAIL_HOW   before | after | torn (a write does half of its work first) | an errno, as a number
 *
 *   XIM_CLOCK      seconds by which this process sees the wall clock wrong
 *   XIM_UID        who this process thinks it is
 *
 * failpoint_arm does the same later, and counts from 1 again.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OFF, BEFORE, AFTER, TORN, ERROR };

static char dir[PATH_MAX];
static int log_fd = -1, at, how = OFF, error_number, files_only;
static atomic_int count;
static time_t clock_offset;

#define REAL(name) ({ static typeof(&name) real_; if (!real_) real_ = dlsym(RTLD_NEXT, #name); real_; })

void failpoint_arm(const char *directory, const char *log_path, int number, const char *mode, const char *only)
{
    files_only = !strcmp(only, "files");
    snprintf(dir, sizeof dir, "%s", directory ? directory : "");
    if (log_path && *log_path)
        log_fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    at = number;
    error_number = atoi(mode);
    how = error_number ? ERROR : !strcmp(mode, "before") ? BEFORE : !strcmp(mode, "after") ? AFTER : TORN;
    count = 0;
}

__attribute__((constructor)) static void from_environment(void)
{
    const char *number = getenv("XIM_FAIL_AT"), *mode = getenv("XIM_FAIL_HOW"), *only = getenv("XIM_FAIL_ONLY");
    if (getenv("XIM_CLOCK"))
        clock_offset = atol(getenv("XIM_CLOCK"));
    if (getenv("XIM_FAIL_DIR"))
        failpoint_arm(getenv("XIM_FAIL_DIR"), getenv("XIM_FAIL_LOG"), number ? atoi(number) : 0,
                      mode ? mode : "before", only ? only : "");
}

static int inside(const char *path)
{
    size_t n = strlen(dir);
    return n && !strncmp(path, dir, n) && (path[n] == '/' || !path[n]);
}

static const char *name_of(int fd, char *path)
{
    char link[40];
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0)
        return NULL;
    path[n] = 0;
    if (!strncmp(path, "socket:", 7))
        return !files_only && !getsockname(fd, (struct sockaddr *)&address, &size)
            && (address.ss_family == AF_INET || address.ss_family == AF_INET6) ? "socket" : NULL;
    return inside(path) ? path : NULL;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* What the caller has to do: OFF nothing, AFTER die afterwards, TORN half of it and die, ERROR fail with errno set. */
static int reached(const char *operation, const char *what)
{
    if (!dir[0] || !what)
        return OFF;
    int number = atomic_fetch_add(&count, 1) + 1;
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%d %s %s\n", number, operation, what);
        syscall(SYS_write, log_fd, line, n);
    }
    if (number != at)
        return OFF;
    if (how == BEFORE)
        die();
    if (how == ERROR)
        errno = error_number;
    return how;
}

#define WRAP(type, name, operation, what, declaration, call, torn)                                                     \
    type name declaration                                                                                              \
    {                                                                                                                  \
        char path[PATH_MAX];                                                                                           \
        (void)path;                                                                                                    \
        int then = reached(operation, what);                                                                           \
        if (then == ERROR)                                                                                             \
            return -1;                                                                                                 \
        if (then == TORN) {                                                                                            \
            torn;                                                                                                      \
            die();                                                                                                     \
        }                                                                                                              \
        type result = REAL(name) call;                                                                                 \
        if (then == AFTER)                                                                                             \
            die();                                                                                                     \
        return result;                                                                                                 \
    }

/* The path of `name` in the directory `fd`, which may be AT_FDCWD. */
static const char *name_at(int fd, const char *name, char *path)
{
    char link[40], base[PATH_MAX];
    if (name[0] == '/' || fd == AT_FDCWD)
        return inside(name) ? name : NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0)
        return NULL;
    base[n] = 0;
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX)
        return NULL;
    return inside(path) ? path : NULL;
}

static const char *write_or_send(int fd)
{
    struct stat status;
    return !fstat(fd, &status) && S_ISSOCK(status.st_mode) ? "send" : "write";
}

#define FD name_of(fd, path)
#define PATH(p) (inside(p) ? (p) : NULL)

WRAP(ssize_t, write, write_or_send(fd), FD, (int fd, const void *data, size_t n), (fd, data, n),
     REAL(write)(fd, data, n / 2))
WRAP(ssize_t, pwrite, "write", FD, (int fd, const void *data, size_t n, off_t o), (fd, data, n, o),
     REAL(pwrite)(fd, data, n / 2, o))
WRAP(ssize_t, pwrite64, "write", FD, (int fd, const void *data, size_t n, off64_t o), (fd, data, n, o),
     REAL(pwrite64)(fd, data, n / 2, o))
WRAP(ssize_t, writev, "write", FD, (int fd, const struct iovec *v, int n), (fd, v, n), )
WRAP(int, ftruncate, "truncate", FD, (int fd, off_t n), (fd, n), )
WRAP(int, ftruncate64, "truncate", FD, (int fd, off64_t n), (fd, n), )
WRAP(int, fsync, "fsync", FD, (int fd), (fd), )
WRAP(int, fdatasync, "fsync", FD, (int fd), (fd), )
WRAP(int, fchmod, "chmod", FD, (int fd, mode_t mode), (fd, mode), )
WRAP(int, rename, "rename", PATH(to), (const char *from, const char *to), (from, to), )
WRAP(int, renameat, "rename", name_at(b, to, path), (int a, const char *from, int b, const char *to), (a, from, b, to), )
WRAP(int, unlink, "unlink", PATH(p), (const char *p), (p), )
WRAP(int, unlinkat, "unlink", name_at(fd, p, path), (int fd, const char *p, int flags), (fd, p, flags), )
WRAP(int, mkdirat, "mkdir", name_at(fd, p, path), (int fd, const char *p, mode_t mode), (fd, p, mode), )
WRAP(int, mkdir, "mkdir", PATH(p), (const char *p, mode_t mode), (p, mode), )
WRAP(int, connect, "connect", FD, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n), )
WRAP(ssize_t, send, "send", FD, (int fd, const void *data, size_t n, int f), (fd, data, n, f),
     REAL(send)(fd, data, n / 2, f))
WRAP(ssize_t, sendmsg, "send", FD, (int fd, const struct msghdr *m, int f), (fd, m, f), )
WRAP(ssize_t, recv, "receive", FD, (int fd, void *data, size_t n, int f), (fd, data, n, f), )
WRAP(ssize_t, recvmsg, "receive", FD, (int fd, struct msghdr *m, int f), (fd, m, f), )

/* Opening counts when it makes or changes a file. */
#define OPEN(name, place, declaration, call)                                                                           \
    int name declaration                                                                                               \
    {                                                                                                                  \
        char path[PATH_MAX];                                                                                           \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            __builtin_va_list list;                                                                                    \
            __builtin_va_start(list, flags);                                                                           \
            mode = __builtin_va_arg(list, mode_t);                                                                     \
            __builtin_va_end(list);                                                                                    \
        }                                                                                                              \
        int then = flags & (O_CREAT | O_TRUNC) ? reached("open", name_at(place, p, path)) : OFF;                       \
        if (then == ERROR)                                                                                             \
            return -1;                                                                                                 \
        int result = REAL(name) call;                                                                                  \
        if (then != OFF)                                                                                               \
            die();                                                                                                     \
        return result;                                                                                                 \
    }

OPEN(open, AT_FDCWD, (const char *p, int flags, ...), (p, flags, mode))
OPEN(open64, AT_FDCWD, (const char *p, int flags, ...), (p, flags, mode))
OPEN(openat, at_fd, (int at_fd, const char *p, int flags, ...), (at_fd, p, flags, mode))
OPEN(openat64, at_fd, (int at_fd, const char *p, int flags, ...), (at_fd, p, flags, mode))

int clock_gettime(clockid_t id, struct timespec *now)
{
    int result = REAL(clock_gettime)(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)
        now->tv_sec += clock_offset;
    return result;
}

time_t time(time_t *now)
{
    time_t result = REAL(time)(NULL) + clock_offset;
    if (now)
        *now = result;
    return result;
}

uid_t geteuid(void)
{
    return getenv("XIM_UID") ? (uid_t)atol(getenv("XIM_UID")) : REAL(geteuid)();
}
