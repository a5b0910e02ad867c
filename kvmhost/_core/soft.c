#include "soft_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Accesses of one vCPU before its thread switches to the next. */
#define TURN 1024
#define WRITE_FLAG (1ull << 63)

struct trace {
	uint64_t random;
	uint64_t position;
	uint64_t base;
};

struct vcpu {
	_Alignas(64) struct trace trace;
	struct kh_tlb tlb;
	uint64_t tlb_seq;
	uint64_t published; /* accesses, for others to read */
	struct kh_soft_result result;
	bool done;
};

struct worker {
	struct kh_soft *soft;
	uint32_t index;
	bool joined;
	pthread_t thread;
};

struct kh_soft {
	struct kh_mmu *mmu;
	struct kh_soft_config config;
	uint64_t *list;
	struct vcpu *vcpus;
	struct worker *workers;
	uint32_t n_started;
	bool stop;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* splitmix64: one multiply-xor chain per number, any seed is valid. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* Uniform in [0, n), by the high half of a product. */
static uint64_t below(uint64_t *state, uint64_t n)
{
	return (uint64_t)(((unsigned __int128)next_random(state) * n) >> 64);
}

static void trace_init(struct trace *trace, const struct kh_soft_config *config, uint32_t vcpu)
{
	trace->random = config->seed * 0x2545f4914f6cdd1dull + vcpu;
	trace->base = config->gfn_start;
	trace->position = 0;
	if (config->flags & KH_SOFT_PRIVATE)
		trace->base += vcpu * config->n_pages;
	if (config->flags & KH_SOFT_PHASED)
		trace->position = config->n_pages / config->n_vcpus * vcpu;
}

static uint64_t next_page(struct trace *trace, const struct kh_soft_config *config,
			  const uint64_t *list)
{
	uint64_t step, rank, at;

	switch (config->trace) {
	case KH_TRACE_STRIDE:
		at = trace->position;
		trace->position = (at + config->stride) % config->n_pages;
		return trace->base + at;
	case KH_TRACE_RANDOM:
		return trace->base + below(&trace->random, config->n_pages);
	case KH_TRACE_QUANTILE:
		step = below(&trace->random, config->n_list - 1);
		rank = list[step];
		if (list[step + 1] > rank)
			rank += below(&trace->random, list[step + 1] - rank);
		return trace->base +
		       (uint64_t)(((unsigned __int128)rank * config->scatter) % config->n_pages);
	default:
		at = trace->position;
		trace->position = at + 1 == config->n_list ? 0 : at + 1;
		return list[at];
	}
}

static uint64_t next_access(struct trace *trace, const struct kh_soft_config *config,
			    const uint64_t *list)
{
	uint64_t gfn = next_page(trace, config, list);

	if (config->write_permille && below(&trace->random, 1000) < config->write_permille)
		gfn |= WRITE_FLAG;
	return gfn;
}

/* Handle a fault until it is resolved; false if the access is impossible. */
static bool handle_fault(struct kh_soft *soft, struct vcpu *vcpu, uint64_t gfn, bool write)
{
	struct kh_mmu *mmu = soft->mmu;
	uint64_t seq = kh_mmu_fault_begin(mmu);
	int result = kh_mmu_fault_finish(mmu, soft->config.as_id, gfn, write, seq);

	vcpu->result.faults++;
	if (result == -EAGAIN) {
		vcpu->result.fault_retries++;
		sched_yield();
		return !__atomic_load_n(&soft->stop, __ATOMIC_RELAXED);
	}
	if (result == -ESHUTDOWN)
		__atomic_store_n(&soft->stop, true, __ATOMIC_RELAXED);
	return result == 0;
}

static void access_page(struct kh_soft *soft, struct vcpu *vcpu, uint64_t gfn, bool write)
{
	struct kh_mmu *mmu = soft->mmu;
	/* Before the walk: a flush during the walk is then seen at the next access. */
	uint64_t seq = __atomic_load_n(&mmu->tlb_seq, __ATOMIC_SEQ_CST);
	struct kh_translation found;
	uint64_t set = 0;

	if (seq != vcpu->tlb_seq) {
		kh_tlb_flush(&vcpu->tlb);
		vcpu->tlb_seq = seq;
		vcpu->result.tlb_flushes++;
	}
	vcpu->result.accesses++;
	vcpu->result.last_gfn = gfn;
	if (kh_tlb_lookup(&vcpu->tlb, gfn, write)) {
		vcpu->result.tlb_hits++;
		return;
	}
	vcpu->result.tlb_misses++;
	for (;;) {
		unsigned int slot = kh_epoch_enter(&mmu->epoch);
		int fault = kh_hw_walk(mmu, soft->config.as_id, gfn, write, &found, &set);

		kh_epoch_exit(&mmu->epoch, slot);
		if (!fault)
			break;
		if (!handle_fault(soft, vcpu, gfn, write)) {
			vcpu->result.errors++;
			vcpu->result.set_young += set;
			return;
		}
	}
	vcpu->result.set_young += set;
	kh_tlb_insert(&vcpu->tlb, gfn, found.level, found.write);
}

static bool take_turn(struct kh_soft *soft, struct vcpu *vcpu)
{
	uint64_t left = TURN, start = now_ns(), set = vcpu->result.set_young;
	uint64_t limit = soft->config.n_accesses;

	if (limit && limit - vcpu->result.accesses < left)
		left = limit - vcpu->result.accesses;
	for (; left && !__atomic_load_n(&soft->stop, __ATOMIC_RELAXED); left--) {
		uint64_t next = next_access(&vcpu->trace, &soft->config, soft->list);

		access_page(soft, vcpu, next & ~WRITE_FLAG, next & WRITE_FLAG);
	}
	kh_count(&soft->mmu->counters.set_young, vcpu->result.set_young - set);
	vcpu->result.busy_ns += now_ns() - start;
	__atomic_store_n(&vcpu->published, vcpu->result.accesses, __ATOMIC_RELAXED);
	return limit && vcpu->result.accesses >= limit;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct kh_soft *soft = worker->soft;
	uint32_t left;

	do {
		left = 0;
		for (uint32_t i = worker->index; i < soft->config.n_vcpus;
		     i += soft->config.n_threads) {
			struct vcpu *vcpu = &soft->vcpus[i];

			if (!vcpu->done)
				vcpu->done = take_turn(soft, vcpu);
			left += !vcpu->done;
		}
	} while (left && !__atomic_load_n(&soft->stop, __ATOMIC_RELAXED));
	return NULL;
}

static bool config_ok(const struct kh_soft_config *config)
{
	bool listed = config->trace == KH_TRACE_QUANTILE || config->trace == KH_TRACE_LIST;

	return config->n_vcpus && config->n_threads && config->n_threads <= config->n_vcpus &&
	       config->trace <= KH_TRACE_LIST && config->n_pages && config->write_permille <= 1000 &&
	       (!listed || (config->n_list && config->list_address)) &&
	       (config->trace != KH_TRACE_QUANTILE || config->n_list > 1);
}

static void soft_free(struct kh_soft *soft)
{
	for (uint32_t i = 0; soft->vcpus && i < soft->config.n_vcpus; i++)
		kh_tlb_destroy(&soft->vcpus[i].tlb);
	free(soft->vcpus);
	free(soft->workers);
	free(soft->list);
	free(soft);
}

static int soft_init(struct kh_soft *soft)
{
	const struct kh_soft_config *config = &soft->config;
	size_t n_bytes = config->n_vcpus * sizeof(*soft->vcpus);

	soft->vcpus = aligned_alloc(64, n_bytes);
	soft->workers = calloc(config->n_threads, sizeof(*soft->workers));
	if (!soft->vcpus || !soft->workers)
		return -ENOMEM;
	memset(soft->vcpus, 0, n_bytes);
	if (config->n_list) {
		soft->list = malloc(config->n_list * sizeof(*soft->list));
		if (!soft->list)
			return -ENOMEM;
		memcpy(soft->list, (const void *)(uintptr_t)config->list_address,
		       config->n_list * sizeof(*soft->list));
	}
	for (uint32_t i = 0; i < config->n_vcpus; i++) {
		struct vcpu *vcpu = &soft->vcpus[i];
		int result = kh_tlb_init(&vcpu->tlb, config->tlb_sets, config->tlb_ways,
					 config->huge_sets, config->huge_ways, &soft->mmu->fmt);

		if (result < 0)
			return result;
		trace_init(&vcpu->trace, config, i);
	}
	return 0;
}

int kh_soft_start(struct kh_soft **out, struct kh_mmu *mmu, const struct kh_soft_config *config)
{
	struct kh_soft *soft;
	int result;

	if (!config_ok(config) || !mmu->arena)
		return -EINVAL;
	soft = calloc(1, sizeof(*soft));
	if (!soft)
		return -ENOMEM;
	soft->mmu = mmu;
	soft->config = *config;
	result = soft_init(soft);
	if (result < 0) {
		soft_free(soft);
		return result;
	}
	for (; soft->n_started < config->n_threads; soft->n_started++) {
		struct worker *worker = &soft->workers[soft->n_started];

		*worker = (struct worker){ .soft = soft, .index = soft->n_started };
		result = -pthread_create(&worker->thread, NULL, work, worker);
		if (result < 0) {
			kh_soft_stop(soft);
			kh_soft_finish(soft, NULL);
			return result;
		}
	}
	*out = soft;
	return 0;
}

void kh_soft_stop(struct kh_soft *soft)
{
	__atomic_store_n(&soft->stop, true, __ATOMIC_RELAXED);
}

uint64_t kh_soft_progress(struct kh_soft *soft)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < soft->config.n_vcpus; i++)
		sum += __atomic_load_n(&soft->vcpus[i].published, __ATOMIC_RELAXED);
	return sum;
}

int kh_soft_wait(struct kh_soft *soft, uint32_t timeout_ms)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	for (uint32_t i = 0; i < soft->n_started; i++) {
		struct worker *worker = &soft->workers[i];

		if (!worker->joined && pthread_timedjoin_np(worker->thread, NULL, &until))
			return 0;
		worker->joined = true;
	}
	return 1;
}

int kh_soft_finish(struct kh_soft *soft, struct kh_soft_result *results)
{
	for (uint32_t i = 0; i < soft->n_started; i++)
		if (!soft->workers[i].joined)
			pthread_join(soft->workers[i].thread, NULL);
	for (uint32_t i = 0; results && i < soft->config.n_vcpus; i++)
		results[i] = soft->vcpus[i].result;
	soft_free(soft);
	return 0;
}

int kh_soft_trace(const struct kh_soft_config *config, uint32_t vcpu, uint64_t *out, uint64_t n)
{
	struct trace trace;

	if (!config_ok(config) || vcpu >= config->n_vcpus)
		return -EINVAL;
	trace_init(&trace, config, vcpu);
	for (uint64_t i = 0; i < n; i++)
		out[i] = next_access(&trace, config,
				     (const uint64_t *)(uintptr_t)config->list_address);
	return 0;
}
