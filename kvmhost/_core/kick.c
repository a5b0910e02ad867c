#include "kick.h"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static void on_kick(int signal_number)
{
	(void)signal_number;
}

/*
 * A standard signal: sending a real-time one fails with EAGAIN once the user has
 * RLIMIT_SIGPENDING signals queued, a standard one is then sent without its siginfo
 * (__send_signal_locked() in kernel/signal.c). Several that are pending at once
 * count as one, which is enough: each only makes the thread check its flags. By
 * default SIGURG is ignored, so a late one is harmless.
 */
int kh_kick_signal(void)
{
	return SIGURG;
}

int kh_kick_setup(void)
{
	struct sigaction action = { .sa_handler = on_kick }, old;

	if (sigaction(kh_kick_signal(), NULL, &old))
		return -errno;
	/* An ignored signal interrupts nothing, and exec() passes SIG_IGN on. */
	if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN)
		return 0;
	return sigaction(kh_kick_signal(), &action, NULL) ? -errno : 0;
}

int kh_thread_mask_signals(void)
{
	sigset_t set;

	sigfillset(&set);
	sigdelset(&set, kh_kick_signal());
	return -pthread_sigmask(SIG_SETMASK, &set, NULL);
}

int kh_kick_thread(int tid)
{
	if (syscall(SYS_tgkill, getpid(), tid, kh_kick_signal()) && errno != ESRCH)
		return -errno;
	return 0;
}
