"""What the profile of a token tells."""

from gpu_trace import Counts, Event, counted


def test_a_profile_tells_launches_and_waits_of_the_host_from_the_gpu_s_work():
    host = ["cudaGraphLaunch", "cudaMemcpyAsync", "cuLaunchKernelEx", "cudaLaunchKernel"]
    host += ["cudaEventSynchronize", "cudaStreamWaitEvent", "cudaEventRecord", "aten::copy_"]
    device = ["_product", "_add_norm", "Memcpy DtoH (Device -> Pinned)"]
    events = [Event(name, False) for name in host] + [Event(name, True) for name in device]
    assert counted(events) == Counts(launches=4, kernels=3, syncs=1)
