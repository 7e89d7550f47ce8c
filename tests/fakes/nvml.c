/* NVML's C interface, as far as pynvml calls it for the agent, played from a text file that FAKE_NVML names. The file is
 * read anew at every call, so that a test changes the machine by writing it. Without FAKE_NVML no driver is loaded.
 *
 * One thing a line, fields separated by tabs, `key=value`:
 *   driver  version=570.86.15  cuda=12080  init=0     `init`: NVML error code of nvmlInit
 *   gpu     name=… uuid=… bus=… total=… used=… major=9 minor=0 mig=-1 recovery=-1 error=0 memory_error=0 events=0
 *           `mig`: 1 on, 0 off, -1 not supported; `recovery`: -1 not known by this driver; `error`: code of every call
 *           for this GPU; `memory_error`, `events`: code of the memory query, of registering events
 *   slice   uuid=… total=… used=…                     a MIG slice of the GPU above it
 *   xid     gpu=0  number=79                          told once to each event set that was made before the line came
 *   hang                                              nvmlInit and the event wait do not return while this line is there
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, NO_DRIVER = 9, TIMEOUT = 10 };
enum { LINES = 64, FIELD = 96, SLICES = 8 };

static int sessions;
static int inits;
static int told;
static struct { char text[1024]; } lines[LINES];
static int count;

static void load(void) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    count = 0;
    if (!file)
        return;
    while (count < LINES && fgets(lines[count].text, sizeof lines[count].text, file)) {
        lines[count].text[strcspn(lines[count].text, "\n")] = 0;
        if (lines[count].text[0])
            count++;
    }
    fclose(file);
}

static int is(int line, const char *word) {
    size_t n = strlen(word);
    return !strncmp(lines[line].text, word, n) && (lines[line].text[n] == '\t' || !lines[line].text[n]);
}

static int find(const char *word, int number) {
    for (int i = 0; i < count; i++)
        if (is(i, word) && number-- == 0)
            return i;
    return -1;
}

static int many(const char *word) {
    int n = 0;
    while (find(word, n) >= 0)
        n++;
    return n;
}

static const char *get(int line, const char *key, const char *otherwise) {
    static char value[8][FIELD];
    static int turn;
    char wanted[FIELD];
    snprintf(wanted, sizeof wanted, "\t%s=", key);
    const char *at = line < 0 ? NULL : strstr(lines[line].text, wanted);
    if (!at)
        return otherwise;
    char *out = value[turn++ % 8];
    snprintf(out, FIELD, "%.*s", (int)strcspn(at + strlen(wanted), "\t"), at + strlen(wanted));
    return out;
}

static long long number(int line, const char *key, long long otherwise) {
    const char *text = get(line, key, NULL);
    return text ? atoll(text) : otherwise;
}

/* A handle is 0x1000 + GPU * 16, plus 1 + slice for a MIG slice. */
static void *handle_of(int gpu, int slice) { return (void *)(uintptr_t)(0x1000 + gpu * 16 + slice + 1); }
static int gpu_of(void *handle) { return (int)(((uintptr_t)handle - 0x1000) / 16); }
static int slice_of(void *handle) { return (int)(((uintptr_t)handle - 0x1000) % 16) - 1; }

static int slice_line(int gpu, int slice) {
    for (int i = find("gpu", gpu) + 1; i > 0 && i < count && !is(i, "gpu"); i++)
        if (is(i, "slice") && slice-- == 0)
            return i;
    return -1;
}

static int begin(void *handle, int *gpu, int *line) {
    load();
    if (!sessions)
        return UNINITIALIZED;
    *gpu = find("gpu", gpu_of(handle));
    if (*gpu < 0)
        return INVALID;
    *line = slice_of(handle) < 0 ? *gpu : slice_line(gpu_of(handle), slice_of(handle));
    return (int)number(*gpu, "error", OK);
}

static void wait_while_hung(void) {
    for (load(); find("hang", 0) >= 0; load())
        usleep(2000);
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    wait_while_hung();
    if (!getenv("FAKE_NVML"))
        return NO_DRIVER;
    int status = (int)number(find("driver", 0), "init", OK);
    sessions += status == OK;
    inits++;
    return status;
}

int nvmlShutdown(void) {
    if (!sessions)
        return UNINITIALIZED;
    sessions--;
    return OK;
}

int fake_nvml_sessions(void) { return sessions; }
void fake_nvml_reset(void) { sessions = inits = told = 0; }
int fake_nvml_inits(void) { return inits; }

const char *nvmlErrorString(int status) {
    switch (status) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 6: return "Not Found";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    load();
    snprintf(out, length, "%s", get(find("driver", 0), "version", "570.86.15"));
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    load();
    *out = (int)number(find("driver", 0), "cuda", 12080);
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    load();
    *out = (unsigned)many("gpu");
    return sessions ? OK : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    load();
    int line = find("gpu", (int)index);
    if (line < 0)
        return INVALID;
    *out = handle_of((int)index, -1);
    return (int)number(line, "error", OK);
}

int nvmlDeviceGetName(void *handle, char *out, unsigned length) {
    int gpu, line, status = begin(handle, &gpu, &line);
    snprintf(out, length, "%s", status ? "" : get(gpu, "name", "NVIDIA H100 80GB HBM3"));
    return status;
}

int nvmlDeviceGetUUID(void *handle, char *out, unsigned length) {
    int gpu, line, status = begin(handle, &gpu, &line);
    snprintf(out, length, "%s", status ? "" : get(line, "uuid", "GPU-0"));
    return status;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *out) {
    int gpu, line, status = begin(handle, &gpu, &line);
    if (status == OK)
        status = (int)number(gpu, "memory_error", OK);
    if (status != OK)
        return status;
    out[0] = (unsigned long long)number(line, "total", 0);
    out[2] = (unsigned long long)number(line, "used", 0);
    out[1] = out[0] - out[2];
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    int gpu, line, status = begin(handle, &gpu, &line);
    if (status == OK) {
        *major = (int)number(gpu, "major", 9);
        *minor = (int)number(gpu, "minor", 0);
    }
    return status;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {
    int gpu, line, status = begin(handle, &gpu, &line), mode = status ? -1 : (int)number(gpu, "mig", -1);
    if (status == OK && mode < 0)
        return NOT_SUPPORTED;
    *now = *pending = (unsigned)mode;
    return status;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) {
    (void)handle;
    *out = SLICES;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **out) {
    int gpu, line, status = begin(handle, &gpu, &line);
    if (status == OK && slice_line(gpu_of(handle), (int)index) < 0)
        return NOT_FOUND;
    *out = handle_of(gpu_of(handle), (int)index);
    return status;
}

typedef struct {
    char old_bus[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} Pci;

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *out) {
    int gpu, line, status = begin(handle, &gpu, &line);
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "%s", status ? "" : get(gpu, "bus", "00000000:00:00.0"));
    return status;
}

typedef struct {
    uint32_t id, scope;
    int64_t time, latency;
    uint32_t type, status;
    union { unsigned ui; unsigned long long ull; double d; } value;
} Field;

int nvmlDeviceGetFieldValues(void *handle, int n, Field *fields) {
    int gpu, line, status = begin(handle, &gpu, &line);
    for (int i = 0; status == OK && i < n; i++) {
        int action = fields[i].id == 230 ? (int)number(gpu, "recovery", -1) : -1;
        fields[i].status = action < 0 ? NOT_SUPPORTED : OK;
        fields[i].value.ui = (unsigned)(action < 0 ? 0 : action);
    }
    return status;
}

typedef struct {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} Event;

int nvmlEventSetCreate(void **out) {
    load();
    told = many("xid");
    *out = &told;
    return OK;
}

int nvmlEventSetFree(void *set) {
    (void)set;
    return OK;
}

int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set) {
    (void)types, (void)set;
    int gpu, line, status = begin(handle, &gpu, &line);
    return status ? status : (int)number(gpu, "events", OK);
}

int nvmlEventSetWait_v2(void *set, Event *out, unsigned timeout) {
    (void)set, (void)timeout;
    wait_while_hung();
    int line = find("xid", told);
    if (line < 0)
        return TIMEOUT;
    told++;
    memset(out, 0, sizeof *out);
    out->device = handle_of((int)number(line, "gpu", 0), -1);
    out->type = 8;
    out->data = (unsigned long long)number(line, "number", 0);
    return OK;
}
