// Exchange between ranks by one-sided stores into the peers' arenas (struct moe_peers).
//
//   moe_target    entry -> slot over all ranks, one of the expert's replicas
//   moe_place     entry -> its token's place among those that the slot's rank receives
//   moe_send      each token once to every rank that holds one of its experts, then the flags
//   moe_receive   waits for every rank's tokens; rows that none filled choose nothing
//   moe_return    each expert's row back to the rank and the entry it came from, then the flags
//   moe_arrive    waits for every rank's results; moe_combine then adds them in top-k order
//
// With collectives (How: EXCHANGE_SWAP, EXCHANGE_GATHER, else EXCHANGE_STORE) moe_send leaves tokens in
// this rank's own arena, for each rank or for all, and moe_return the sum over a token's experts that
// are here; the runtime moves both once moe_receive and moe_arrive have seen every rank's flag. moe_keep
// then leaves of all ranks' tokens the choices that this one serves.
//
// Places come from prefix sums, not from atomics, so that runs agree bit for bit. Flags carry the
// epoch and go to every rank, those included that nothing is sent to. As each phase waits for a
// flag of every rank, dispatch e+1 shows that all are done with combine e, and combine e that all
// are done with dispatch e: one buffer is enough, nothing is reset, and there is no entry barrier.
#pragma once

constexpr int kShareOne = 65536; // MOE_SHARE_ONE
constexpr int EXCHANGE_STORE = 0, EXCHANGE_SWAP = 1, EXCHANGE_GATHER = 2;

__device__ __forceinline__ moe_arena_head *arena_head(const moe_args &a, int rank) {
    return reinterpret_cast<moe_arena_head *>(a.exchange.peer[rank]);
}

// Lanes of a mask below this one.
__device__ __forceinline__ int below(unsigned mask) {
    return __popc(mask & ~(0xffffffffu << threadIdx.x % 32));
}

// The slot that serves the nth entry of expert e on this rank. With shares the entries walk the
// whole [0, kShareOne) by an odd step, so that any few in a row are spread as the shares say.
__device__ __forceinline__ int replica_of(const moe_args &a, int e, int nth) {
    const moe_peers &x = a.exchange;
    const int first = x.first_slot[e], count = x.first_slot[e + 1] - first;
    int pick = count > 1 ? (nth + x.rank) % count : 0;
    if (count > 1 && x.share_end) {
        const int at = static_cast<int>(
            (static_cast<unsigned>(nth) * 40503u + static_cast<unsigned>(x.rank) * 23473u) %
            kShareOne);
        for (pick = 0; pick + 1 < count && at >= x.share_end[first + pick];)
            pick++;
    }
    return count > 0 ? x.slot_list[first + pick] : -1;
}

// grid ceil(T*k / blockDim.x), whole warps. Shared memory: E ints.
template <int>
__global__ void __launch_bounds__(512) moe_target(const __grid_constant__ moe_args a) {
    int *seen = dyn_smem<int>(); // of each expert, in entries before
    const int tid = threadIdx.x;
    const int entries = a.num_tokens * kTopK, begin = blockIdx.x * blockDim.x;
    const int turn = a.exchange.turn ? begin / a.exchange.turn : 0; // blockDim.x divides it
    for (int e = tid; e < kExperts; e += blockDim.x)
        seen[e] = 0;
    __syncthreads();
    for (int i = turn * a.exchange.turn + tid; i < begin; i += blockDim.x) {
        const int e = a.topk_idx[i];
        if (e >= 0 && e < kExperts)
            atomicAdd(&seen[e], 1);
    }
    __syncthreads();
    const int entry = begin + tid;
    int e = entry < entries ? a.topk_idx[entry] : -1;
    if (e < 0 || e >= kExperts)
        e = -1;
    const unsigned same = __match_any_sync(0xffffffffu, e);
    const int before = below(same);
    int nth = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); warp++) { // they take turns
        if (warp == tid / 32) {
            nth = e >= 0 ? seen[e] + before : 0;
            __syncwarp();
            if (e >= 0 && before == 0)
                seen[e] += __popc(same);
        }
        __syncthreads();
    }
    if (entry < entries) {
        const int slot = e >= 0 ? replica_of(a, e, nth + turn) : -1;
        static_cast<int *>(a.ws[MOE_WS_TARGET])[entry] = slot;
        static_cast<int *>(a.ws[MOE_WS_SENT])[entry] = slot >= 0 ? entry : -1;
    }
}

__device__ __forceinline__ bool goes_to(const moe_args &a, int entry, int rank) {
    const int slot = static_cast<const int *>(a.ws[MOE_WS_TARGET])[entry];
    return slot >= 0 && slot / a.params.slots == rank;
}

// One block per target rank, whole warps. Shared memory: 32 ints.
template <int>
__global__ void __launch_bounds__(256) moe_place(const __grid_constant__ moe_args a) {
    int *sums = dyn_smem<int>(); // tokens of each warp
    const int tid = threadIdx.x, lane = tid % 32, warps = blockDim.x / 32, rank = blockIdx.x;
    int base = 0;
    for (int t0 = 0; t0 < a.num_tokens; t0 += blockDim.x) {
        const int t = t0 + tid;
        bool to = false;
        for (int j = 0; t < a.num_tokens && j < kTopK; j++)
            to = goes_to(a, t * kTopK + j, rank) || to;
        const unsigned same = __match_any_sync(0xffffffffu, to);
        if (lane == 0)
            sums[tid / 32] = to ? __popc(same) : 32 - __popc(same);
        __syncthreads();
        int place = base + below(same);
        for (int w = 0; w < warps; w++) {
            place += w < tid / 32 ? sums[w] : 0;
            base += sums[w];
        }
        for (int j = 0; to && j < kTopK; j++)
            if (goes_to(a, t * kTopK + j, rank))
                static_cast<int *>(a.ws[MOE_WS_PLACE])[t * kTopK + j] = place;
        __syncthreads();
    }
    if (tid == 0)
        static_cast<int *>(a.ws[MOE_WS_TOKENS_TO])[rank] = base;
}

// True, for the whole block, in the last block of the launch to come here: what all blocks have
// stored is then before whatever this one releases.
__device__ __forceinline__ bool last_block(int *counter, int *shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomic_add_acq_rel(counter, 1) == static_cast<int>(gridDim.x) - 1;
        if (*shared)
            *counter = 0;
    }
    __syncthreads();
    return *shared;
}

// A token as it travels: bf16, or e4m3 and its scales.
constexpr bool kSendFp8 = kFormat == MOE_FORMAT_FP8_BLOCK;
constexpr int kSendChunks = kHidden / (kSendFp8 ? 16 : 8); // 16 bytes each
constexpr int kSendScales = kSendFp8 ? (kHidden + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK : 0;

// By the whole block: token t to row[j] of each base[j].
template <int How>
__device__ __forceinline__ void send_token(const moe_args &a, int t, char *const *base,
                                           const int *row) {
    const moe_peers &x = a.exchange;
    const long long to_hidden = How == EXCHANGE_STORE ? x.hidden : x.sent_hidden;
    const long long to_scales = How == EXCHANGE_STORE ? x.scales : x.sent_scales;
    const uint4 *from = static_cast<const uint4 *>(kSendFp8 ? a.ws[MOE_WS_X8] : a.x16) +
                        static_cast<long long>(t) * kSendChunks;
    const float *scales =
        static_cast<const float *>(a.ws[MOE_WS_XS]) + static_cast<long long>(t) * kSendScales;
    for (int c = threadIdx.x; c < kSendChunks; c += blockDim.x) {
        const uint4 v = from[c];
        for (int j = 0; j < kTopK; j++)
            if (base[j])
                reinterpret_cast<uint4 *>(
                    base[j] + to_hidden)[static_cast<long long>(row[j]) * kSendChunks + c] = v;
    }
    for (int c = threadIdx.x; c < kSendScales; c += blockDim.x) {
        const float v = scales[c];
        for (int j = 0; j < kTopK; j++)
            if (base[j])
                reinterpret_cast<float *>(
                    base[j] + to_scales)[static_cast<long long>(row[j]) * kSendScales + c] = v;
    }
}

// Collectives: rows that no token fills choose nothing.
template <int How> __device__ __forceinline__ void send_nothing(const moe_args &a) {
    const moe_peers &x = a.exchange;
    int *ids = reinterpret_cast<int *>(x.peer[x.rank] + x.sent_ids);
    const int *tokens_to = static_cast<const int *>(a.ws[MOE_WS_TOKENS_TO]);
    for (int r = blockIdx.x; r < (How == EXCHANGE_GATHER ? 1 : x.ranks); r += gridDim.x) {
        const int count = How == EXCHANGE_GATHER ? a.num_tokens : tokens_to[r];
        for (int i = count * kTopK + threadIdx.x; i < x.stride * kTopK; i += blockDim.x)
            ids[static_cast<long long>(r) * x.stride * kTopK + i] = -1;
    }
}

// Where the token's j-th choice goes, null: where an earlier one does. A thread for each j.
template <int How>
__device__ __forceinline__ void address_choice(const moe_args &a, int t, int j, char **base,
                                               int *row) {
    const moe_peers &x = a.exchange;
    const int slot = static_cast<const int *>(a.ws[MOE_WS_TARGET])[t * kTopK + j];
    const int rank = slot >= 0 ? slot / a.params.slots : 0;
    const int place = How == EXCHANGE_GATHER
                          ? t
                          : static_cast<const int *>(a.ws[MOE_WS_PLACE])[t * kTopK + j];
    bool first = slot >= 0;
    for (int i = 0; i < j; i++)
        first = first && !goes_to(a, t * kTopK + i, rank);
    if (How != EXCHANGE_STORE) // where its sum comes back
        static_cast<int *>(a.ws[MOE_WS_SENT])[t * kTopK + j] =
            first ? rank * x.stride + place : -1;
    if (How == EXCHANGE_GATHER) // once, for all
        first = j == 0;
    base[j] = first ? x.peer[How == EXCHANGE_STORE ? rank : x.rank] : nullptr;
    row[j] = How == EXCHANGE_STORE  ? x.rank * x.stride + place
             : How == EXCHANGE_SWAP ? rank * x.stride + place
                                    : t;
}

// Any grid. Shared memory: k pointers, k ints, one int.
template <int How>
__global__ void __launch_bounds__(256) moe_send(const __grid_constant__ moe_args a) {
    const moe_peers &x = a.exchange;
    char **base = dyn_smem<char *>(); // arena of the j-th choice's rank, null: that rank has it
    int *row = reinterpret_cast<int *>(base + kTopK); // the token's row there
    const int tid = threadIdx.x;
    moe_arena_head *head = arena_head(a, x.rank);
    const unsigned epoch = head->epoch + 1;
    const int *target = static_cast<const int *>(a.ws[MOE_WS_TARGET]);
    const long long to_ids = How == EXCHANGE_STORE ? x.ids : x.sent_ids;
    const long long to_weights = How == EXCHANGE_STORE ? x.weights : x.sent_weights;
    if (head->failed)
        return;
    for (int t = blockIdx.x; t < a.num_tokens; t += gridDim.x) {
        const int *slot = target + t * kTopK;
        if (tid < kTopK)
            address_choice<How>(a, t, tid, base, row);
        __syncthreads();
        send_token<How>(a, t, base, row);
        for (int n = tid; n < kTopK * kTopK; n += blockDim.x) {
            const int j = n / kTopK, i = n % kTopK;
            if (!base[j])
                continue;
            const bool there =
                slot[i] >= 0 && slot[i] / a.params.slots == slot[j] / a.params.slots;
            const long long at = static_cast<long long>(row[j]) * kTopK + i;
            reinterpret_cast<int *>(base[j] + to_ids)[at] = How == EXCHANGE_GATHER ? slot[i]
                                                            : there ? slot[i] % a.params.slots
                                                                    : -1;
            reinterpret_cast<float *>(base[j] + to_weights)[at] = a.topk_weight[t * kTopK + i];
        }
        if (How == EXCHANGE_STORE && tid < kTopK && base[tid])
            reinterpret_cast<int *>(base[tid] + x.sources)[row[tid]] = t;
        __syncthreads();
    }
    if (How != EXCHANGE_STORE)
        send_nothing<How>(a);
    if (!last_block(&head->sent, row + kTopK))
        return;
    for (int r = tid; r < x.ranks; r += blockDim.x)
        if (x.peer[r])
            store_release_sys(
                &arena_head(a, r)->dispatched[x.rank],
                moe_flag(epoch, head->generation,
                         static_cast<const unsigned *>(a.ws[MOE_WS_TOKENS_TO])[r]));
    if (tid == 0)
        head->epoch = epoch;
}

// The first wait that gives up says so to the host; every one names whom it missed.
__device__ __forceinline__ void give_up(const moe_args &a, unsigned epoch, int peer,
                                        int phase) {
    moe_status *s = a.exchange.status;
    s->missing[peer] = 1;
    if (atomicAdd(&arena_head(a, a.exchange.rank)->failed, 1) != 0)
        return;
    s->rank = a.exchange.rank;
    s->peer = peer;
    s->phase = phase;
    s->epoch = epoch;
    store_release_sys(&s->failed, 1);
}

// Waits until the flag carries the epoch, at most for the timeout, and while nobody else has given
// up. False when it never came.
__device__ __forceinline__ bool await(const moe_args &a, const moe_u64 *flag, unsigned epoch,
                                      int peer, int phase, moe_u64 *value) {
    const moe_arena_head *head = arena_head(a, a.exchange.rank);
    const moe_u64 wanted = moe_flag(epoch, head->generation, 0), start = clock_ns();
    for (unsigned spins = 1;; spins++) {
        *value = load_acquire_sys(flag);
        if ((*value & ~static_cast<moe_u64>(MOE_FLAG_TOKENS)) == wanted)
            return true;
        if (spins % 64 == 0 &&
            (load_relaxed_sys(&head->failed) || load_relaxed_sys(&a.exchange.status->abort) ||
             clock_ns() - start > a.exchange.timeout))
            break;
        pause_poll();
    }
    give_up(a, epoch, peer, phase);
    return false;
}

// One block per source rank. Shared memory: one int. What a collective brings is there as it was sent.
template <int How>
__global__ void __launch_bounds__(256) moe_receive(const __grid_constant__ moe_args a) {
    const moe_peers &x = a.exchange;
    const int source = blockIdx.x, tid = threadIdx.x;
    int *count = dyn_smem<int>();
    moe_arena_head *head = arena_head(a, x.rank);
    if (tid == 0) {
        moe_u64 flag;
        const bool came = x.peer[source] && await(a, &head->dispatched[source], head->epoch,
                                                  source, MOE_PHASE_DISPATCH, &flag);
        *count = came ? min(static_cast<int>(flag & MOE_FLAG_TOKENS), x.stride) : 0;
    }
    __syncthreads();
    if (How != EXCHANGE_STORE && x.peer[source])
        return;
    int *ids = reinterpret_cast<int *>(x.peer[x.rank] + x.ids) +
               static_cast<long long>(source) * x.stride * kTopK;
    for (int i = *count * kTopK + tid; i < x.stride * kTopK; i += blockDim.x)
        ids[i] = -1;
}

// Gathered choices, slots over all ranks, become this rank's own. grid ceil(T*k / blockDim.x), T the
// received tokens.
template <int>
__global__ void __launch_bounds__(256) moe_keep(const __grid_constant__ moe_args a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.num_tokens * kTopK)
        return;
    const int slot = a.topk_idx[i];
    a.topk_idx[i] =
        slot >= 0 && slot / a.params.slots == a.exchange.rank ? slot % a.params.slots : -1;
}

// Received token n's experts that are here, added in the order of its choices: its row of partials.
__device__ __forceinline__ void return_sum(const moe_args &a, long long n, const int *row_of) {
    const float *weight = a.topk_weight + n * kTopK;
    const bf16 *y = static_cast<const bf16 *>(a.ws[MOE_WS_Y]);
    uint4 *to =
        reinterpret_cast<uint4 *>(a.exchange.peer[a.exchange.rank] + a.exchange.partials) +
        n * (kHidden / 8);
    bool any = false;
    for (int j = 0; j < kTopK; j++)
        any = any || row_of[j] >= 0;
    for (int c = threadIdx.x; any && c < kHidden / 8; c += blockDim.x) {
        float v[8] = {};
        for (int j = 0; j < kTopK; j++)
            if (row_of[j] >= 0)
                add8(v, y + static_cast<long long>(row_of[j]) * kHidden + c * 8,
                     kInputWeight ? 1.0f : weight[j]);
        to[c] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                           pack_bf16(v[6], v[7]));
    }
}

// Its experts' rows to the rank and the entries that they came from.
__device__ __forceinline__ void return_rows(const moe_args &a, int n, const int *row_of) {
    const moe_peers &x = a.exchange;
    const int source = reinterpret_cast<const int *>(x.peer[x.rank] + x.sources)[n];
    const uint4 *y = static_cast<const uint4 *>(a.ws[MOE_WS_Y]);
    char *base = x.peer[n / x.stride] + x.results;
    for (int j = 0; j < kTopK; j++) {
        const long long row = row_of[j];
        if (row < 0 || source < 0 || source >= x.stride)
            continue;
        uint4 *to = reinterpret_cast<uint4 *>(base) +
                    (static_cast<long long>(source) * kTopK + j) * (kHidden / 8);
        for (int c = threadIdx.x; c < kHidden / 8; c += blockDim.x)
            to[c] = y[row * (kHidden / 8) + c];
    }
}

// Any grid. Shared memory: one int.
template <int How>
__global__ void __launch_bounds__(256) moe_return(const __grid_constant__ moe_args a) {
    const moe_peers &x = a.exchange;
    moe_arena_head *head = arena_head(a, x.rank);
    const unsigned epoch = head->epoch;
    if (head->failed)
        return;
    for (int n = blockIdx.x; n < x.ranks * x.stride; n += gridDim.x) {
        const int *row_of =
            static_cast<const int *>(a.ws[MOE_WS_ROW_OF]) + static_cast<long long>(n) * kTopK;
        if (How == EXCHANGE_STORE)
            return_rows(a, n, row_of);
        else
            return_sum(a, n, row_of);
    }
    if (!last_block(&head->returned, dyn_smem<int>()))
        return;
    for (int r = threadIdx.x; r < x.ranks; r += blockDim.x)
        if (x.peer[r])
            store_release_sys(&arena_head(a, r)->combined[x.rank],
                              moe_flag(epoch, head->generation, 0));
}

// One block; its threads share the source ranks.
template <int>
__global__ void __launch_bounds__(128) moe_arrive(const __grid_constant__ moe_args a) {
    moe_arena_head *head = arena_head(a, a.exchange.rank);
    const bool failed = load_relaxed_sys(&head->failed); // before any of this launch gives up
    __syncthreads();
    for (int r = threadIdx.x; !failed && r < a.exchange.ranks; r += blockDim.x) {
        moe_u64 flag;
        if (a.exchange.peer[r])
            await(a, &head->combined[r], head->epoch, r, MOE_PHASE_COMBINE, &flag);
    }
}
