/* Records, in order and with their data, the calls by which a process changes the files below one folder.

   Loaded with LD_PRELOAD; it does nothing until `recorder_begin(folder, log, kill_at)` is called in the process. With
   `kill_at` n > 0 the process sends itself SIGKILL instead of making its n-th recorded change. Each record is a
   `struct record`, the path (two paths with a zero byte between them for a rename), then the data of a write.

   Not seen: writes through a shared memory map (a record MAP says that there was one), through stdio, and system calls
   made without libc, as the rename with which safetensors gives a file its name: OPEN has the inode's number, by which
   `disk.py` finds it again. Each whole record is played back and compared with the real folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, SIZE, ALLOCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, CLOSE, DUP, LINK, SYMLINK, MAP };
struct record { int32_t kind, pid, fd, flags; int64_t offset, length; int32_t path, pad; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;
static long kill_at, changes;
static char tracked[65536];

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)
#define HELD(fd) (log_fd >= 0 && (fd) >= 0 && (fd) < 65536 && tracked[fd])

static void take(void) { pthread_mutex_lock(&lock); }
static void leave(void) { pthread_mutex_unlock(&lock); }
__attribute__((constructor)) static void prepare(void) { pthread_atfork(take, leave, leave); }

int recorder_begin(const char *folder, const char *log, long at) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    kill_at = at;
    changes = 0;
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    int high = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 900); /* out of the way of the program's own numbers */
    syscall(SYS_close, fd);
    log_fd = high;
    return high < 0 ? -1 : 0;
}

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size) {
        ssize_t n = syscall(SYS_write, log_fd, at, size);
        if (n <= 0) abort(); /* a record with a hole would lie */
        at += n, size -= n;
    }
}

static void record(int kind, int fd, int flags, int64_t offset, int64_t length, const char *path, size_t paths,
                   const void *data) {
    int saved = errno;
    struct record r = {kind, getpid(), fd, flags, offset, length, (int32_t)paths, 0};
    put(&r, sizeof r);
    if (paths) put(path, paths);
    if (kind == WRITE) put(data, length);
    errno = saved;
}

/* Counts a change that is about to be made; the one that was asked for is not made, the process ends. */
static void about_to_change(void) {
    if (kill_at && ++changes == kill_at) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
}

/* The absolute form of a path; 1 where it is the folder or below it. */
static int below(int dir, const char *path, char *out) {
    if (log_fd < 0 || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX] = "";
        if (dir == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    }
    return !strncmp(out, root, root_length) && (!out[root_length] || out[root_length] == '/');
}

static void opened(int fd, int flags, int existed, const char *path) {
    if (fd < 0 || fd >= 65536) return;
    tracked[fd] = 1;
    struct stat s = {0};
    syscall(SYS_fstat, fd, &s);
    record(OPEN, fd, flags, existed, s.st_ino, path, strlen(path), 0);
}

static int open_any(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    if (!below(dir, path, full)) {
        int fd = syscall(SYS_openat, dir, path, flags, mode);
        if (log_fd >= 0 && fd >= 0 && fd < 65536) tracked[fd] = 0;
        return fd;
    }
    take();
    struct stat s;
    int existed = !syscall(SYS_newfstatat, AT_FDCWD, full, &s, 0);
    if ((flags & O_TRUNC) || ((flags & O_CREAT) && !existed)) about_to_change();
    int fd = syscall(SYS_openat, dir, path, flags, mode);
    opened(fd, flags, existed, full);
    leave();
    return fd;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }

int open(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags) return open_any(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags) return open_any(dir, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return open_any(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return open_any(dir, path, flags, 0); }

int close(int fd) {
    if (!HELD(fd)) return syscall(SYS_close, fd);
    take();
    tracked[fd] = 0;
    int r = syscall(SYS_close, fd);
    record(CLOSE, fd, 0, 0, 0, 0, 0, 0);
    leave();
    return r;
}

static int doubled(int from, int to) {
    if (to >= 0 && to < 65536 && log_fd >= 0) {
        take();
        tracked[to] = from >= 0 && from < 65536 ? tracked[from] : 0;
        if (tracked[to]) record(DUP, from, to, 0, 0, 0, 0, 0);
        leave();
    }
    return to;
}

int dup(int fd) { return doubled(fd, syscall(SYS_dup, fd)); }
int dup2(int fd, int to) { REAL(dup2); return doubled(fd, real(fd, to)); }
int dup3(int fd, int to, int flags) { return doubled(fd, syscall(SYS_dup3, fd, to, flags)); }

static int control(int fd, int command, void *argument) {
    int r = syscall(SYS_fcntl, fd, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? doubled(fd, r) : r;
}
int fcntl(int fd, int command, ...) { va_list a; va_start(a, command); void *x = va_arg(a, void *); va_end(a); return control(fd, command, x); }
int fcntl64(int fd, int command, ...) { va_list a; va_start(a, command); void *x = va_arg(a, void *); va_end(a); return control(fd, command, x); }

ssize_t write(int fd, const void *data, size_t size) {
    if (!HELD(fd)) return syscall(SYS_write, fd, data, size);
    take();
    about_to_change();
    ssize_t n = syscall(SYS_write, fd, data, size);
    if (n > 0) record(WRITE, fd, 0, lseek(fd, 0, SEEK_CUR) - n, n, 0, 0, data);
    leave();
    return n;
}

static ssize_t write_there(int fd, const void *data, size_t size, off_t offset) {
    if (!HELD(fd)) return syscall(SYS_pwrite64, fd, data, size, offset);
    take();
    about_to_change();
    ssize_t n = syscall(SYS_pwrite64, fd, data, size, offset);
    if (n > 0) record(WRITE, fd, 0, offset, n, 0, 0, data);
    leave();
    return n;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_there(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return write_there(fd, data, size, offset); }

static ssize_t write_parts(int fd, const struct iovec *parts, int count, off_t offset, int there) {
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t n = there ? write_there(fd, parts[i].iov_base, parts[i].iov_len, offset + total)
                          : write(fd, parts[i].iov_base, parts[i].iov_len);
        if (n < 0) return total ? total : n;
        total += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return total;
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return HELD(fd) ? write_parts(fd, parts, count, 0, 0) : real(fd, parts, count);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(pwritev);
    return HELD(fd) ? write_parts(fd, parts, count, offset, 1) : real(fd, parts, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(pwritev64);
    return HELD(fd) ? write_parts(fd, parts, count, offset, 1) : real(fd, parts, count, offset);
}

/* Copies inside the kernel are refused: every caller then copies by read and write, which is seen. */
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    if (HELD(out)) { errno = EINVAL; return -1; }
    return syscall(SYS_sendfile, out, in, offset, count);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t count) { return sendfile(out, in, offset, count); }
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t count, unsigned flags) {
    if (HELD(out)) { errno = EXDEV; return -1; }
    return syscall(SYS_copy_file_range, in, from, out, to, count, flags);
}

static int resize(int fd, off_t size) {
    if (!HELD(fd)) return syscall(SYS_ftruncate, fd, size);
    take();
    about_to_change();
    int r = syscall(SYS_ftruncate, fd, size);
    if (!r) record(SIZE, fd, 0, size, 0, 0, 0, 0);
    leave();
    return r;
}
int ftruncate(int fd, off_t size) { return resize(fd, size); }
int ftruncate64(int fd, off_t size) { return resize(fd, size); }
int truncate(const char *path, off_t size) {
    int fd = open_any(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    int r = resize(fd, size);
    close(fd);
    return r;
}
int truncate64(const char *path, off_t size) { return truncate(path, size); }

static int allocate(int fd, int how, off_t offset, off_t length) {
    if (!HELD(fd)) return syscall(SYS_fallocate, fd, how, offset, length);
    take();
    about_to_change();
    int r = syscall(SYS_fallocate, fd, how, offset, length);
    if (!r) record(ALLOCATE, fd, how, offset + length, 0, 0, 0, 0);
    leave();
    return r;
}
int fallocate(int fd, int how, off_t offset, off_t length) { return allocate(fd, how, offset, length); }
int fallocate64(int fd, int how, off_t offset, off_t length) { return allocate(fd, how, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return allocate(fd, 0, offset, length) ? errno : 0; }
int posix_fallocate64(int fd, off_t offset, off_t length) { return posix_fallocate(fd, offset, length); }

static int settle(int fd, long number) {
    if (!HELD(fd)) return syscall(number, fd);
    take();
    about_to_change();
    int r = syscall(number, fd);
    if (!r) record(SYNC, fd, 0, 0, 0, 0, 0, 0);
    leave();
    return r;
}
int fsync(int fd) { return settle(fd, SYS_fsync); }
int fdatasync(int fd) { return settle(fd, SYS_fdatasync); }

static int move(int from_dir, const char *from, int to_dir, const char *to, unsigned flags, int kind) {
    char one[PATH_MAX], two[PATH_MAX], both[2 * PATH_MAX];
    int a = below(from_dir, from, one), b = below(to_dir, to, two);
    int seen = a || b;
    if (seen) take(), about_to_change();
    int r = kind == LINK ? syscall(SYS_linkat, from_dir, from, to_dir, to, flags)
                         : syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    if (seen && !r) {
        size_t n = strlen(one), m = strlen(two);
        memcpy(both, one, n + 1);
        memcpy(both + n + 1, two, m);
        record(kind, -1, 0, 0, 0, both, n + 1 + m, 0);
    }
    if (seen) leave();
    return r;
}
int rename(const char *from, const char *to) { return move(AT_FDCWD, from, AT_FDCWD, to, 0, RENAME); }
int renameat(int a, const char *from, int b, const char *to) { return move(a, from, b, to, 0, RENAME); }
int renameat2(int a, const char *from, int b, const char *to, unsigned f) { return move(a, from, b, to, f, RENAME); }
int link(const char *from, const char *to) { return move(AT_FDCWD, from, AT_FDCWD, to, 0, LINK); }
int linkat(int a, const char *from, int b, const char *to, int f) { return move(a, from, b, to, f, LINK); }

static int name_change(int dir, const char *path, int kind, int argument) {
    char full[PATH_MAX];
    int seen = below(dir, path, full);
    if (seen) take(), about_to_change();
    int r = kind == MKDIR ? syscall(SYS_mkdirat, dir, path, argument) : syscall(SYS_unlinkat, dir, path, argument);
    if (seen && !r) record(kind, -1, 0, 0, 0, full, strlen(full), 0);
    if (seen) leave();
    return r;
}
int mkdir(const char *path, mode_t mode) { return name_change(AT_FDCWD, path, MKDIR, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { return name_change(dir, path, MKDIR, mode); }
int rmdir(const char *path) { return name_change(AT_FDCWD, path, RMDIR, AT_REMOVEDIR); }
int unlink(const char *path) { return name_change(AT_FDCWD, path, UNLINK, 0); }
int unlinkat(int dir, const char *path, int flags) {
    return name_change(dir, path, flags & AT_REMOVEDIR ? RMDIR : UNLINK, flags);
}
int remove(const char *path) { return unlink(path) && errno == EISDIR ? rmdir(path) : 0; }
int symlink(const char *target, const char *path) {
    char full[PATH_MAX];
    int seen = below(AT_FDCWD, path, full);
    if (seen) take();
    int r = syscall(SYS_symlinkat, target, AT_FDCWD, path);
    if (seen && !r) record(SYMLINK, -1, 0, 0, 0, full, strlen(full), 0);
    if (seen) leave();
    return r;
}

static void *map(void *at, size_t size, int access, int flags, int fd, off_t offset) {
    void *r = (void *)syscall(SYS_mmap, at, size, access, flags, fd, offset);
    if (r != MAP_FAILED && (flags & MAP_SHARED) && (access & PROT_WRITE) && HELD(fd)) {
        take();
        record(MAP, fd, access, offset, size, 0, 0, 0);
        leave();
    }
    return r;
}
void *mmap(void *at, size_t size, int access, int flags, int fd, off_t offset) { return map(at, size, access, flags, fd, offset); }
void *mmap64(void *at, size_t size, int access, int flags, int fd, off_t offset) { return map(at, size, access, flags, fd, offset); }
