"""The table of known error texts of CANN, HCCL, CUDA, NCCL and gloo, for `messages.py` to search. Imports no torch."""

import re
from dataclasses import dataclass
from functools import cached_property

_ACL = "the error table of torch_npu 2.13.0 (torch_npu/csrc/core/npu/NPUErrorCodes.h, acl/error_codes/rt_error_codes.h in its wheel)"
_HCCL = "CANN's hcomm, err_msg.cc (EI codes with their causes and solutions)"
_PLOG = (
    "CANN writes the cause to its plog, ~/ascend/log/debug/plog/ by default (ASCEND_PROCESS_LOG_PATH moves it; "
    "ASCEND_GLOBAL_LOG_LEVEL=1 says more)."
)
_BLOCKING = "ASCEND_LAUNCH_BLOCKING=1 makes the traceback end at the call that failed (slow; unset it afterwards)."


@dataclass(frozen=True)
class Message:
    """One kind of error. `pattern` is searched in the text, and `also` has to be somewhere in it too; `sample` is real text that has it."""

    name: str
    pattern: str
    meaning: str
    advice: str
    source: str
    sample: str
    also: str = ""

    @cached_property
    def _compiled(self) -> tuple[re.Pattern, re.Pattern]:
        return re.compile(self.pattern), re.compile(self.also)

    def found_in(self, text: str) -> bool:
        """Whether the text has this error."""
        pattern, also = self._compiled
        return bool(pattern.search(text) and also.search(text))


def _acl(code: int) -> str:
    """A return code of CANN's runtime as torch_npu and CANN print it; a bare number could be anything."""
    said = r"error code(?: is|:)?|runtime result|errorCode|retCode|ret|result|\bacl\w+\([^\n]{0,60}\) failed:"
    return rf"(?:{said})\W{{0,4}}{code}\b"


MESSAGES = (
    Message(
        name="torch_npu without CANN",
        pattern=r"lib(?:hccl|ascendcl|acl_op_compiler|ge_runner|graph|acl_tdt_channel|ascend_hal)\.so: cannot open shared object file"
        r"|Failed to load the backend extension: torch_npu",
        meaning="torch_npu is installed, but CANN's libraries are not found; `import torch` loads torch_npu by itself, so it fails too.",
        advice="On a machine with NPUs run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` (CANN 8.5 and later: "
        "/usr/local/Ascend/cann/set_env.sh), "
        "or install CANN. Without NPUs: `pip uninstall torch-npu`, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0. `llmtrain doctor` says which.",
        source="seen with torch_npu 2.13.0 and no CANN; vllm-ascend issue 262",
        sample="ImportError: libhccl.so: cannot open shared object file: No such file or directory",
    ),
    Message(
        name="torch_npu against another torch or CANN",
        pattern=r"undefined symbol: \S+",
        also=r"torch_npu|libascend|libhccl|libatb|Ascend/",
        meaning="torch_npu was built for another torch or another CANN than the ones that are loaded.",
        advice="`llmtrain doctor` compares torch, torch_npu, CANN and driver with the table of pairs and says what to install.",
        source="vllm-ascend issues 340 and 750; Ascend/pytorch issue 99",
        sample="OSError: /usr/lib/python3.9/site-packages/torch_npu/lib/libop_plugin_atb.so: undefined symbol: _ZN3atb15CreateOperation",
    ),
    Message(
        name="ub overflow",
        pattern=r"(?:ub|cbuf|cc|l0c) overflow, requires \d+ bits while \d+ bits available",
        meaning="A Triton kernel's tile does not fit into the on-chip buffer of an NPU core (UB: 192 KiB on 910B); tiles tuned for GPUs "
        "often do not.",
        advice="Use smaller blocks for that kernel, or take another implementation: `llmtrain kernels --device npu` lists them, "
        "kernels.OP=reference is always there.",
        source="bishengir-compile 1.2.0; triton-ascend issues 302, 1638, 1640, 2246",
        sample="error: ub overflow, requires 2897920 bits while 1572864 bits available! (possible reason: tiling basic block is too large)",
    ),
    Message(
        name="coreDim",
        pattern=r"coreDim\W{0,3}\d+ can'?t be greater than UINT16_MAX|grid should be less than 65536",
        meaning="A Triton kernel was launched with more than 65,535 programs, which Ascend does not allow; GPUs do.",
        advice="Use larger blocks or a loop inside the kernel; or take another implementation (`llmtrain kernels --device npu`), or "
        "smaller train.micro_batch or seq_len. "
        "TRITON_ALL_BLOCKS_PARALLEL=1 lets triton-ascend loop by itself where the kernel allows it.",
        source="sglang issue 10554; triton-ascend's programming guide",
        sample="RuntimeError: coreDim=123408 can't be greater than UINT16_MAX",
    ),
    Message(
        name="EI0001",
        pattern=r"\bEI0001\b",
        meaning="An environment variable of HCCL has a value that HCCL refuses; the message names it.",
        advice="Correct or unset that variable on every node; `llmtrain doctor` lists the ones that are set.",
        source=_HCCL,
        sample="EI0001: Environment variable [HCCL_CONNECT_TIMEOUT] is invalid. Reason: the value is out of range.",
    ),
    Message(
        name="EI0002",
        pattern=r"\bEI0002\b|The wait execution of the Notify register times out",
        meaning="HCCL waited in a collective (1,800 s unless HCCL_EXEC_TIMEOUT says otherwise) for a rank that did not come: that rank "
        "failed, hangs, is slow, or calls another collective.",
        advice="Look for the first error of any rank: the ranks that time out are usually the healthy ones. log/hang.txt of the run "
        "folder names the rank that did not arrive and where it was. "
        f"Only if a rank is rightly slow, raise parallel.timeout and HCCL_EXEC_TIMEOUT together. {_PLOG}",
        source=_HCCL,
        sample="EI0002: [PID: 2225827] 2025-09-24-20:59:48.119.066 The wait execution of the Notify register times out. "
        "Reason: The Notify register has not received the Notify record from remote rank [1].",
    ),
    Message(
        name="EI0004",
        pattern=r"\bEI0004\b|\bEI0014\b|\bEI0017\b",
        meaning="HCCL read a rank table file (RANK_TABLE_FILE) that does not fit this machine.",
        advice="llmtrain needs no rank table: unset RANK_TABLE_FILE and RANK_ID.",
        source=_HCCL,
        sample="EI0004: Failed to parse the ranktable file /root/rank_table.json. Reason: the file does not exist.",
    ),
    Message(
        name="EI0005",
        pattern=r"\bEI0005\b",
        meaning="Two ranks called the same collective with different parameters (count, type, or order of calls).",
        advice="Compare the ranks' configurations and software: every rank must run the same version with the same YAML. log/hang.txt "
        "shows which collective each rank was in.",
        source=_HCCL,
        sample="EI0005: The parameters of operator allreduce are inconsistent between ranks, parameter count is 1024 on the local rank "
        "and 2048 on the remote rank.",
    ),
    Message(
        name="EI0006",
        pattern=r"\bEI0006\b|Communication_Error_Get_Socket|Getting socket times out",
        meaning="HCCL could not connect two ranks in time (120 s unless HCCL_CONNECT_TIMEOUT says otherwise): one did not start, "
        "failed, was late, or the network between them is down.",
        advice="If only some ranks say this, look at the others' first error. If all do, look at the network: `hccn_tool -i 0 -link -g` "
        "must say UP for every device, device addresses must reach each other, "
        "and no older process may hold the port. For slow starts set HCCL_CONNECT_TIMEOUT=600 on every node. HCCL_SOCKET_IFNAME picks "
        "the host's interface.",
        source=f"{_HCCL}; vllm-ascend issues 486 and 1955",
        sample="EI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: Remote Rank did not send the data "
        "in time. Please check the reason for the rank being stuck",
    ),
    Message(
        name="EI0007",
        pattern=r"\bEI0007\b|\bEI0011\b",
        meaning="HCCL could not get memory or another resource for a communicator.",
        advice="Every communicator takes 2 x HCCL_BUFFSIZE (200 MB) per rank: lower HCCL_BUFFSIZE, use fewer mesh axes, or leave more "
        "memory free (smaller train.micro_batch). `npu-smi info` shows other processes.",
        source=f"{_HCCL}; CANN's environment variable reference, HCCL_BUFFSIZE",
        sample="EI0007: Failed to allocate resource[DeviceMemory] with info [size:209715200]. Reason: Memory resources are exhausted.",
    ),
    Message(
        name="EI0008",
        pattern=r"\bEI0008\b|The CANN versions are inconsistent",
        meaning="The nodes have different versions of CANN.",
        advice="Install the same CANN on every node; `torchrun ... -m llmtrain doctor` compares them.",
        source="CANN 7.0.RC1 troubleshooting guide, EI0008",
        sample="EI0008: The CANN versions are inconsistent. tag[HcomAllReduce], local version [8.2.RC1], remote version [8.1.RC1]",
    ),
    Message(
        name="EI0009",
        pattern=r"\bEI0009\b|\bEI0013\b|\bEI0018\b|\bEJ0002\b|error cqe",
        meaning="The link between two NPUs failed, or the process at its other end has gone.",
        advice="Find the first error of the other rank. If it has none: `hccn_tool -i N -link -g`, `-optical -g` and `-ip -g` on both "
        "nodes; a link that flaps shows in `hccn_tool -i N -link_stat -g`.",
        source=f"{_HCCL}; vllm-ascend issue 3162",
        sample="EI0009: [PID: 2225827] 2025-09-24-20:59:48.119.066 Transport init error. Reason: [Create][DestLink]Create Dest error!",
    ),
    Message(
        name="EI0015",
        pattern=r"\bEI0015\b",
        meaning="The ranks of an HCCL group did not find each other over the hosts' network.",
        advice="Check that every rank of the group started, that the hosts reach each other, and that HCCL_SOCKET_IFNAME names the "
        "right interface on every node; raise HCCL_CONNECT_TIMEOUT for slow starts.",
        source=_HCCL,
        sample="EI0015: Failed to collect cluster information of the communicator based on rootInfo detection. Reason: timeout.",
    ),
    Message(
        name="EI0019",
        pattern=r"\bEI0019\b|\bEI0020\b|\bEJ0003\b|listen on ip\S* and (?:specific )?port\S* fail",
        meaning="A port that HCCL wants is taken: by an earlier run that still lives, or by a second process on the same NPU.",
        advice="End the older processes (`npu-smi info` lists them); or set HCCL_IF_BASE_PORT and HCCL_NPU_SOCKET_PORT_RANGE to free "
        "ranges on every node.",
        source=f"{_HCCL}; vllm-ascend issue 1955",
        sample="[hccl_socket.cc:100] [2717288][HcclSocket][Listen] socket type[1], listen on ip[192.168.20.160] and specific "
        "port[16666] fail. Please check the port status",
    ),
    Message(
        name="EJ0001",
        pattern=r"\bEJ0001\b|Failed to initialize the HCCP process",
        meaning="The process that serves an NPU's network (HCCP) did not start, mostly because one from an earlier run still holds the "
        "device.",
        advice="End what `npu-smi info` still lists for that NPU, wait some seconds, start again. If it stays, restart the container or "
        "reset the device as its administrator.",
        source="CANN troubleshooting guide, EJ0001",
        sample="EJ0001: [PID: 8146] Failed to initialize the HCCP process. Reason: Maybe the last training process is running.",
    ),
    Message(
        name="207001",
        pattern=rf"{_acl(207001)}|{_acl(207018)}|NPU out of memory|\bEL0004\b",
        meaning="The NPU has no memory left for this tensor.",
        advice="Lower train.micro_batch (the optimizer step stays the same), shard more (parallel.dp_shard, tp, pp), or set "
        "train.recompute: full; PYTORCH_NPU_ALLOC_CONF=expandable_segments:True helps against fragments. "
        "`npu-smi info` shows what other processes hold.",
        source=_ACL,
        sample="RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity; 58.12 GiB already allocated)",
    ),
    Message(
        name="107002",
        pattern=_acl(107002),
        meaning="A call reached CANN before a device was chosen in that thread, or after CANN was shut down.",
        advice="If it comes at the end of a run, the real error is further up. In a thread or plugin of your own, call "
        "torch.npu.set_device first.",
        source=_ACL,
        sample="RuntimeError: getDevice:torch_npu/csrc/core/npu/NPUFunctions.cpp:38 NPU function error: aclrtGetDevice, error code is "
        "107002",
    ),
    Message(
        name="507033",
        pattern=_acl(507033),
        meaning="The NPU could not be started: it is in use, not visible in this container, or driver, firmware and CANN do not fit.",
        advice="`npu-smi info` must work and list the device; in a container, pass /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm, "
        "/dev/hisi_hdc. `llmtrain doctor --device npu` checks these and the versions.",
        source=f"{_ACL}; vllm-ascend issue 4284",
        sample="Initialize:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:152 NPU function error: c10_npu::SetDevice(device_id_), "
        "error code is 507033",
    ),
    Message(
        name="507014",
        pattern=rf"{_acl(507014)}|{_acl(507034)}|{_acl(507017)}|\[aicore timeout\]",
        meaning="A kernel ran longer on the NPU than CANN allows: it hangs, or its input has an extreme shape.",
        advice=f"{_BLOCKING} Then try kernels.OP=reference for the op at fault (`llmtrain kernels --device npu`). {_PLOG}",
        source=_ACL,
        sample="[ERROR] aclrtSynchronizeStream(stream) failed, error code is 507014, Kernel task happen error, retCode=0x25, [aicore "
        "timeout].",
    ),
    Message(
        name="507015",
        pattern=rf"{_acl(507015)}|{_acl(507035)}|{_acl(507011)}|{_acl(507018)}|{_acl(507049)}|The (?:aicore|vector core|aicpu) "
        rf"execution is abnormal",
        meaning="A kernel failed on the NPU: mostly an address out of range (an index or length beyond its tensor) or data that the "
        "kernel does not take. The traceback is where the failure was noticed, not where it happened.",
        advice=f"{_BLOCKING} Then check that call's indices and shapes, or set kernels.OP=reference for the op at fault. {_PLOG}",
        source=f"{_ACL}; Ascend/pytorch issue 66, vllm-ascend issue 7676, tilelang-ascend issue 82",
        sample="RuntimeError: npuSynchronizeDevice:torch_npu/csrc/core/npu/NPUStream.cpp:506 NPU function error: "
        "AclrtSynchronizeDeviceWithTimeout, error code is 507015",
    ),
    Message(
        name="507046",
        pattern=rf"{_acl(507046)}|{_acl(507047)}|{_acl(507012)}",
        meaning="The NPU did not finish its queue in time, usually because a collective in it waits for a rank that failed or hangs.",
        advice=f"Look for the first error of any rank; log/hang.txt of the run folder names the rank that did not arrive. {_PLOG}",
        source=_ACL,
        sample="NPU function error: c10_npu::acl::AclrtSynchronizeStreamWithTimeout(copy_stream), error code is 507046",
    ),
    Message(
        name="507054",
        pattern=rf"{_acl(507054)}|{_acl(507053)}|{_acl(507055)}|SUSPECT MEM ERROR|HBM MULTI BIT ECC ERROR",
        meaning="The NPU reports a fault of its memory (HBM).",
        advice="`npu-smi info -t ecc -i N` shows the counts. Take the device out, go on from the newest checkpoint on others, and let "
        "it be replaced if it happens again.",
        source=_ACL,
        sample="RuntimeError: SUSPECT MEM ERROR, error code is 507053",
    ),
    Message(
        name="507057",
        pattern=rf"{_acl(507057)}|{_acl(507056)}|SUSPECT REMOTE ERROR|{_acl(507901)}|{_acl(507010)}",
        meaning="The link to another NPU or to the device itself broke off (lost heartbeat, remote error).",
        advice="`npu-smi info` and `hccn_tool -i N -link -g` on the nodes named; find the first error of any rank. Go on from the "
        "newest checkpoint.",
        source=_ACL,
        sample="RuntimeError: SUSPECT REMOTE ERROR, reason=[suspect remote error], error code is 507057",
    ),
    Message(
        name="500001",
        pattern=rf"{_acl(500001)}|{_acl(500002)}|\bE[ZH]3002\b|\bE30006\b|build op model failed",
        meaning="CANN could not compile or find an operator: its kernels package is missing or of another version, or a Python package "
        "that its compiler needs is.",
        advice="Install the kernels (ops) package of the same CANN version for this chip, and CANN's Python packages: `pip install "
        "attrs cython numpy decorator sympy cffi pyyaml pathlib2 psutil protobuf scipy requests absl-py`. "
        "`llmtrain doctor` looks at both.",
        source="Ascend/pytorch issue 7; vllm-ascend issue 4284",
        sample="EH9999: Inner Error! [Init][Env]init env failed! build op model failed, result = 500001",
    ),
    Message(
        name="EZ9999",
        pattern=r"\bE[ZHEL]9999\b|\bE[12]9999\b|\bEK9999\b",
        meaning="An error inside CANN; the code alone says nothing. The lines after it (`error code`, `errorStr`, `reason=[...]`) and "
        "the plog say what failed.",
        advice=f"{_BLOCKING} {_PLOG} If the same call works with kernels.OP=reference, report both to whoever made the kernel.",
        source="Ascend/pytorch issue 66; vllm-ascend issue 2630",
        sample="EZ9999: Inner Error!\nEZ9999: [PID: 1234255] 2025-11-08-21:35:27.904.479 The error from device(chipId:7, dieId:0), "
        "serial number is 134",
    ),
    Message(
        name="HCCL watchdog",
        pattern=r"Watchdog caught collective operation timeout",
        also=r"HCCL",
        meaning="A collective did not finish within its time: a rank did not come, or calls another collective.",
        advice="log/hang.txt of the run folder names the rank that did not arrive and where it was; look for its first error. If a rank "
        "is rightly slow, raise parallel.timeout.",
        source="the texts in torch_npu 2.13.0's libtorch_npu.so",
        sample="[Rank 0] Watchdog caught collective operation timeout: WorkHCCL(SeqNum=66, OpType=ALLREDUCE, Timeout(ms)=600000) ran "
        "for 600512 milliseconds before timing out.",
    ),
    Message(
        name="NPU devices in a container",
        pattern=r"dcmi (?:module|model) initialize[d]? failed",
        meaning="npu-smi cannot reach the driver: the device is not in this container, another container holds it, or only root may ask.",
        advice="Pass /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc and mount /usr/local/Ascend/driver and "
        "/usr/local/dcmi; end containers that hold the device; use the group HwHiAiUser.",
        source="vllm-ascend issue 2698; cann-container-image issue 46",
        sample="DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\ndcmi module initialize failed. ret is -8005",
    ),
    Message(
        name="NCCL watchdog",
        pattern=r"Watchdog caught collective operation timeout",
        also=r"NCCL",
        meaning="A collective did not finish within its time: a rank did not come, or calls another collective.",
        advice="log/hang.txt of the run folder names the rank that did not arrive and where it was; look for its first error. If a rank "
        "is rightly slow, raise parallel.timeout. NCCL_DEBUG=INFO tells more of the network.",
        source="torch, ProcessGroupNCCL.cpp; NVIDIA/nccl issue 1610",
        sample="[rank9]:[E218 04:54:22.061694977 ProcessGroupNCCL.cpp:616] [Rank 0] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=66, OpType=ALLREDUCE, NumelIn=1) ran for 600000 milliseconds before timing out.",
    ),
    Message(
        name="NCCL system error",
        pattern=r"unhandled system error|ncclSystemError",
        meaning="A call to the operating system failed inside NCCL: mostly the network between nodes, too small a /dev/shm, or a "
        "locked-memory limit.",
        advice="Run again with NCCL_DEBUG=WARN, whose last line names the call. In Docker use --shm-size=16g (or --ipc=host) and "
        "--ulimit memlock=-1; between nodes set NCCL_SOCKET_IFNAME. `llmtrain doctor` checks all three.",
        source="NCCL user guide, troubleshooting",
        sample="torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
    ),
    Message(
        name="NCCL remote error",
        pattern=r"ncclRemoteError|unhandled cuda error|ncclUnhandledCudaError|ncclInternalError",
        meaning="NCCL failed because of another rank or of CUDA; this rank is usually not the cause.",
        advice="Look for the first error of any rank. If all say this at the start: NCCL_DEBUG=INFO, one GPU per rank "
        "(CUDA_VISIBLE_DEVICES), the same NCCL on every node.",
        source="NCCL user guide, troubleshooting",
        sample="ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ),
    Message(
        name="no kernel image",
        pattern=r"no kernel image is available for execution on the device",
        meaning="This torch (or this extension) was not built for this GPU. Volta (V100) needs a CUDA 12.6 build: those for CUDA 12.8 "
        "and later dropped it with torch 2.11, CUDA 13 knows it no more.",
        advice="V100: `pip install torch --index-url https://download.pytorch.org/whl/cu126`. Others: a build whose "
        "torch.cuda.get_arch_list() has the GPU's architecture. `llmtrain doctor` compares the two.",
        source="pytorch issue 172352 (support matrix of torch 2.11)",
        sample="torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
    ),
    Message(
        name="device-side assert",
        pattern=r"device-side assert triggered|CUDA error: an illegal memory access",
        meaning="A kernel met an index out of range, most often a token or target beyond model.vocab_size. The traceback is where it "
        "was noticed, not where it happened.",
        advice="CUDA_LAUNCH_BLOCKING=1 makes the traceback end at the right call; the same run with --device cpu gives a plain error. "
        "Check that the tokenizer and the token files fit model.vocab_size.",
        source="torch's CUDA error texts",
        sample="RuntimeError: CUDA error: device-side assert triggered",
    ),
    Message(
        name="CUDA out of memory",
        pattern=r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        meaning="The GPU has no memory left for this tensor.",
        advice="Lower train.micro_batch (the optimizer step stays the same), shard more (parallel.dp_shard, tp, pp), or set "
        "train.recompute: full; PYTORCH_ALLOC_CONF=expandable_segments:True helps against fragments. `nvidia-smi` shows what other "
        "processes hold.",
        source="torch's CUDA error texts",
        sample="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.74 GiB of "
        "which 1.10 GiB is free.",
    ),
    Message(
        name="driver too old",
        pattern=r"The NVIDIA driver on your system is too old|CUDA driver version is insufficient",
        meaning="torch was built for a newer CUDA than the driver can serve (CUDA 13 needs driver 580, CUDA 12 driver 525).",
        advice="Install a newer driver, or torch for an older CUDA: `pip install torch --index-url "
        "https://download.pytorch.org/whl/cu126`.",
        source="NVIDIA, CUDA minor version compatibility",
        sample="RuntimeError: The NVIDIA driver on your system is too old (found version 12040).",
    ),
    Message(
        name="CUDA not initialised",
        pattern=r"Error 802: system not yet initialized|Driver/library version mismatch",
        meaning="The GPU's driver is not ready: the fabric manager of an NVSwitch machine does not run, or the driver was updated under "
        "a running kernel module.",
        advice="Start nvidia-fabricmanager (its version must be the driver's), or reboot after a driver update.",
        source="NVIDIA's fabric manager guide; cppuprofile issue 7",
        sample="Failed to initialize NVML: Driver/library version mismatch",
    ),
    Message(
        name="GPU memory fault",
        pattern=r"uncorrectable ECC error encountered|\bXid \(PCI",
        meaning="The GPU reports a fault of its memory or of its connection.",
        advice="`nvidia-smi -q -d ECC` and `dmesg | grep Xid`; reset or replace the GPU and go on from the newest checkpoint.",
        source="NVIDIA, Xid errors",
        sample="RuntimeError: CUDA error: uncorrectable ECC error encountered",
    ),
    Message(
        name="port in use",
        pattern=r"EADDRINUSE|The server socket has failed to listen on any local network address",
        meaning="The port at which ranks meet is taken, mostly by an earlier run that still lives.",
        advice="End that run, or choose another port: `torchrun --master-port N`, or MASTER_PORT.",
        source="torch, TCPStore",
        sample="torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, "
        "useIpv6: false, code: -98, name: EADDRINUSE",
    ),
    Message(
        name="gloo connection",
        pattern=r"gloo\S*/transport/\S+ (?:Connection closed by peer|Timed out waiting|.{0,60}Connection reset by peer)|Gloo "
        r"connectFullMesh failed",
        meaning="The other end of a gloo connection has gone or cannot be reached; this rank is usually not the cause.",
        advice="Look for the first error of any rank. If ranks never connect, the host's name resolves to an address that the others "
        "cannot reach: set GLOO_SOCKET_IFNAME to the right interface.",
        source="gloo's error texts in torch 2.13",
        sample="RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:56211",
    ),
    Message(
        name="shared memory full",
        pattern=r"/dev/shm\S* .{0,40}No space left on device|Error while creating shared memory segment|unable to (?:open|write "
        r"to|allocate) (?:file|shared memory)\S* .{0,60}/dev/shm",
        meaning="/dev/shm is too small; Docker gives a container 64 MB.",
        advice="Docker: --shm-size=16g or --ipc=host. Kubernetes: mount an emptyDir with `medium: Memory` at /dev/shm.",
        source="NCCL user guide, troubleshooting, shared memory",
        sample="misc/shmutils.cc:72 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-AbCdEf (size 9637888)",
    ),
)
