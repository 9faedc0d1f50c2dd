"""A host that believes it has a GPU: torch's tensors, torch.cuda, cuda-bindings and the DSL's own questions."""

from __future__ import annotations

from flash_attn_cute.emulator import pretend_cuda, pretend_driver, pretend_operators, pretend_tensors
from flash_attn_cute.emulator.capture import Capture
from flash_attn_cute.emulator.devices import Device
from flash_attn_cute.emulator.patching import Patches


def install(patches: Patches, capture: Capture, gpu: Device) -> None:
    """Until the patches are restored. Comes before the program imports the DSL, which asks for a device then."""
    pretend_driver.install(patches, gpu, capture)
    pretend_cuda.install(patches, gpu, capture.graphs)
    pretend_tensors.install(patches, capture)
    pretend_operators.install(patches)


def install_for_dsl(patches: Patches, gpu: Device) -> None:
    """Imports the DSL. Its occupancy query compiles a kernel to ask the driver about; the answer is known here."""
    from cutlass.utils import HardwareInfo

    def max_active_clusters(self, cluster_size, stream=None):
        if not 1 <= cluster_size <= 32:
            raise ValueError(f"cluster_size: got {cluster_size}; takes 1 to 32")
        return max(gpu.sms // cluster_size, 1)

    patches.set(HardwareInfo, "get_max_active_clusters", max_active_clusters)
