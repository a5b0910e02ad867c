/*
 * The signal that gets a thread of this process out of a system call in which it
 * waits: a vCPU out of KVM_RUN, a serial port's writer out of write().
 */
#ifndef KVMHOST_KICK_H
#define KVMHOST_KICK_H

#include "compat.h"

/*
 * Install the handler, which is empty. Idempotent; an existing handler of the application
 * is kept.
 */
int kh_kick_setup(void);
/* The signal; threads that run vCPUs block every other one. */
int kh_kick_signal(void);
/* Block all signals but the kick in the calling thread. */
int kh_thread_mask_signals(void);
/* Send the signal to a thread of this process; a thread that has ended is not an error. */
int kh_kick_thread(int tid);

#endif
