/* CANN's C interface over host memory: enough of it for the real torch_npu to make tensors, streams and events without an NPU.
   Compiled with torch_npu's own acl.h, so that the compiler holds every signature to it. A device's memory is the host's, work is done
   when it is queued. STAND_IN_SOC and STAND_IN_COUNT choose what torch_npu finds. Everything that is not here returns 0 (success). */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

static const size_t MEMORY = (size_t)64 << 30;
static int32_t current = 0;
static size_t used = 0;
static uintptr_t handles = 0x1000;

/* Devices. */
aclError aclrtGetDeviceCount(uint32_t *count) {
    const char *given = getenv("STAND_IN_COUNT");
    *count = given ? (uint32_t)atoi(given) : 8;
    return 0;
}
aclError aclrtSetDevice(int32_t device) { current = device; return 0; }
aclError aclrtGetDevice(int32_t *device) { *device = current; return 0; }
const char *aclrtGetSocName(void) {
    const char *given = getenv("STAND_IN_SOC");
    return given ? given : "Ascend910B2";
}
aclError aclrtGetCurrentContext(aclrtContext *context) { *context = (void *)0x10; return 0; }
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { (void)a; (void)b; *can = 1; return 0; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = 1; return 0; }
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value) {
    (void)device; (void)info;
    *value = 20; /* cores of a kind: torch_npu asks for nothing else */
    return 0;
}
const char *aclGetRecentErrMsg(void) { return "(no CANN: stand-in)"; }

/* Memory: a size is kept in front of every block, so that what is in use can be told. */
#define HEAD 512
static aclError take(void **out, size_t size) {
    char *block = aligned_alloc(HEAD, (size + HEAD - 1) / HEAD * HEAD + HEAD);
    if (!block) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    *(size_t *)block = size;
    used += size;
    *out = block + HEAD;
    return 0;
}
static aclError give(void *pointer) {
    if (!pointer) return 0;
    char *block = (char *)pointer - HEAD;
    used -= *(size_t *)block;
    free(block);
    return 0;
}
aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *available, size_t *total) {
    (void)attr;
    *total = MEMORY;
    *available = MEMORY - used;
    return 0;
}
aclError aclrtMalloc(void **out, size_t size, aclrtMemMallocPolicy policy) { (void)policy; return take(out, size); }
aclError aclrtFree(void *pointer) { return give(pointer); }
aclError aclrtMallocHost(void **out, size_t size) { return take(out, size); }
aclError aclrtFreeHost(void *pointer) { return give(pointer); }
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind) {
    (void)kind;
    if (count > room) return ACL_ERROR_INVALID_PARAM;
    memcpy(to, from, count);
    return 0;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, count, kind);
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t count) {
    if (count > room) return ACL_ERROR_INVALID_PARAM;
    memset(to, value, count);
    return 0;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t count, aclrtStream stream) {
    (void)stream;
    return aclrtMemset(to, room, value, count);
}

/* Streams carry nothing: all work is done already. Time-outs are never reached. */
aclError aclrtCreateStream(aclrtStream *stream) { *stream = (void *)(handles += 16); return 0; }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority; (void)flag;
    return aclrtCreateStream(stream);
}
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) { (void)stream; *status = ACL_STREAM_STATUS_COMPLETE; return 0; }
aclError aclrtSynchronizeDevice(void) { return 0; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { (void)timeout; return 0; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { (void)stream; (void)timeout; return 0; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return 0; }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return 0; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { (void)stream; (void)mode; return 0; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { (void)stream; (void)flag; return 0; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return 0; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) { (void)stream; *flag = 0; return 0; }

/* Events keep the time at which they were recorded. */
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    *event = calloc(1, sizeof(struct timespec));
    return *event ? 0 : ACL_ERROR_RT_MEMORY_ALLOCATION;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) { free(event); return 0; }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
    return 0;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    const struct timespec *a = start, *b = end;
    *ms = (float)((double)(b->tv_sec - a->tv_sec) * 1e3 + (double)(b->tv_nsec - a->tv_nsec) / 1e6);
    return 0;
}
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return 0;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    (void)event;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return 0;
}

/* Settings: deterministic mode is kept, so that a test can see it arrive. */
static int64_t settings[64];
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { settings[option] = value; return 0; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { *value = settings[option]; return 0; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { settings[option] = value; return 0; }
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { (void)option; (void)value; return 0; }
size_t aclGetCompileoptSize(aclCompileOpt option) { (void)option; return 16; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    (void)option;
    if (length) {
        strncpy(value, "disable", length - 1);
        value[length - 1] = 0;
    }
    return 0;
}
