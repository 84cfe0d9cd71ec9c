"""What a torch user would run instead: the experts part of one MoE layer with torch._grouped_mm.

Usage: torch_peer.py [shape ...]     prints tab-separated lines
  ceiling  read_tbps  bf16_tflops  fp8_tflops
  peer     shape  tokens  microseconds
Medians of CUDA-graph replays over four routings, mildly skewed, as moec bench does it.
"""
import sys

import torch
import torch.nn.functional as F

SHAPES = {  # hidden, intermediate, experts, top-k
    "qwen3-30b": (2048, 768, 128, 8),
    "qwen3-235b": (4096, 1536, 128, 8),
    "dsv3-ep8-slot32": (7168, 2048, 32, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "llama4-scout": (5120, 8192, 16, 1),
    "dsv3-ep32-slot9": (7168, 2048, 9, 1),
}
TOKENS = [1, 8, 32, 128, 512, 2048, 8192]
ROUTINGS = 4


def median_us(calls, replays=12):
    """Median microseconds of one of the calls, all of them in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(replays + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def skewed_routing(tokens, experts, topk):
    popularity = 0.5 * torch.randn(experts, device="cuda")
    gumbel = -torch.log(-torch.log(torch.rand(tokens, experts, device="cuda")))
    score, idx = torch.topk(popularity + gumbel, topk)
    return idx, torch.softmax(score, -1)


def experts_part(x, w1, w2, idx, weight):
    """Sort by expert, two grouped GEMMs around SwiGLU, back in place, weighted sum."""
    experts, topk = w1.shape[0], idx.shape[1]
    entry_expert, entry = idx.flatten().sort(stable=True)
    ends = torch.searchsorted(entry_expert, torch.arange(experts, device="cuda"), right=True)
    ends = ends.int()
    hidden = torch._grouped_mm(x[entry // topk], w1.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    out = torch.empty_like(y)
    out[entry] = y * weight.flatten()[entry, None].to(y.dtype)
    return out.view(x.shape[0], topk, -1).sum(1)


def ceilings():
    data = torch.randn(1 << 29, device="cuda").view(8192, -1)
    read = data.nbytes / median_us([lambda: data.amax(1)]) / 1e6
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    rate = 2 * 8192**3 / median_us([lambda: a @ b.T]) / 1e6
    fp8 = 0  # not there
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16)
        fp8 = 2 * 8192**3 / median_us([product]) / 1e6
    print(f"ceiling\t{read:.4f}\t{rate:.1f}\t{fp8:.1f}", flush=True)


def bench_shape(name):
    hidden, inter, experts, topk = SHAPES[name]
    w1 = torch.empty(experts, 2 * inter, hidden, device="cuda", dtype=torch.bfloat16)
    w2 = torch.empty(experts, hidden, inter, device="cuda", dtype=torch.bfloat16)
    w1.normal_(0, hidden**-0.5)
    w2.normal_(0, inter**-0.5)
    for tokens in TOKENS:
        calls = []
        for _ in range(ROUTINGS):
            x = torch.randn(tokens, hidden, device="cuda").bfloat16()
            idx, weight = skewed_routing(tokens, experts, topk)
            calls.append(lambda x=x, i=idx, w=weight: experts_part(x, w1, w2, i, w))
        print(f"peer\t{name}\t{tokens}\t{median_us(calls):.1f}", flush=True)


torch.manual_seed(0)
with torch.no_grad():
    ceilings()
    for shape in sys.argv[1:] or SHAPES:
        bench_shape(shape)
        torch.cuda.empty_cache()
