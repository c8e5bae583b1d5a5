"""CPU, CUDA and NPU behind one interface."""

from llmtrain.device.base import Accelerator, Device, DeviceUnavailable, Memory
from llmtrain.device.cpu import CpuDevice
from llmtrain.device.cuda import CudaDevice
from llmtrain.device.npu import NpuDevice
from llmtrain.device.registry import kinds, register, select

register(NpuDevice, preference=2)
register(CudaDevice, preference=1)
register(CpuDevice, preference=0)

__all__ = ["Accelerator", "Device", "DeviceUnavailable", "Memory", "kinds", "register", "select"]
