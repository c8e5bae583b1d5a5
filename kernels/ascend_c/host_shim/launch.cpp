// attention.cpp on a CPU, for ctypes.
#include "../attention.cpp"

namespace {

struct Arguments {
    uint8_t *q, *k, *v, *mask, *workspace, *out, *lse;
    uint32_t batch, heads, kv_heads, queries, keys, q_offset, causal, width;
    float scale;
};

void kernel(void* given) {
    const Arguments& a = *(Arguments*)given;
    (a.width == 64 ? attention_64 : attention_128)(a.q, a.k, a.v, a.mask, a.workspace, a.out, a.lse, a.batch, a.heads, a.kv_heads,
                                                   a.queries, a.keys, a.q_offset, a.causal, a.scale);
}

shim::Region region(const void* from, size_t bytes, bool writable, bool mask = false) {
    return {(uintptr_t)from, (uintptr_t)from + bytes, writable, mask};
}

}  // namespace

extern "C" uint64_t ascend_c_workspace(uint32_t width) {
    return width == 64 ? fast_attention::Exchange<64>::BYTES : fast_attention::Exchange<128>::BYTES;
}

// Runs on `groups` AI cores and fills `report`.
extern "C" void ascend_c_launch(Arguments* a, int groups, shim::Report* report) {
    shim::Machine machine;
    *report = {};
    shim::machine = &machine;
    const size_t rows = (size_t)a->batch * a->heads * a->queries, others = (size_t)a->batch * a->kv_heads * a->keys,
                 pitch = a->width * sizeof(half);
    const size_t edge = fast_attention::TEMPLATE, workspace = groups * ascend_c_workspace(a->width);
    machine.regions = {region(a->q, rows * pitch, false),   region(a->k, others * pitch, false),
                       region(a->v, others * pitch, false), region(a->mask, edge * edge * sizeof(half), false, true),
                       region(a->out, rows * pitch, true),  region(a->lse, rows * 4, true)};
    machine.workspace = region(a->workspace, workspace, true);
    memset(a->workspace, 0xFF, workspace);
    machine.cells.resize(workspace / shim::CELL);
    machine.groups = groups, machine.kernel = kernel, machine.arguments = a, machine.report = report;
    machine.cores.resize(3 * groups), machine.halves.resize(3 * groups * shim::FLAGS);
    for (size_t id = 0; id < machine.cores.size(); ++id) shim::make_core(machine.cores[id], id);
    try {
        shim::run();
    } catch (const shim::Failure& failure) {
        memcpy(report->error, failure.text, sizeof(failure.text));
    }
}
