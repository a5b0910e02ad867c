/* What atomic operations become in a mutant: the same steps, without atomicity. */
#ifndef PLAIN_H
#define PLAIN_H

#define plain_fetch(p, n, op)                                                                    \
	({                                                                                       \
		__typeof__(*(p)) plain_old = *(volatile __typeof__(*(p)) *)(p);                  \
		*(volatile __typeof__(*(p)) *)(p) = plain_old op(n);                             \
		plain_old;                                                                       \
	})
#define plain_fetch_add(p, n, order) plain_fetch(p, n, +)
#define plain_fetch_sub(p, n, order) plain_fetch(p, n, -)
#define plain_fetch_and(p, n, order) plain_fetch(p, n, &)
#define plain_fetch_or(p, n, order) plain_fetch(p, n, |)
#define plain_exchange(p, n, order)                                                              \
	({                                                                                       \
		__typeof__(*(p)) plain_old = *(volatile __typeof__(*(p)) *)(p);                  \
		*(volatile __typeof__(*(p)) *)(p) = (n);                                         \
		plain_old;                                                                       \
	})
#define plain_compare_exchange(p, expected, n, weak, success, failure)                           \
	({                                                                                       \
		__typeof__(*(p)) plain_old = *(volatile __typeof__(*(p)) *)(p);                  \
		bool plain_same = plain_old == *(expected);                                      \
		if (plain_same)                                                                  \
			*(volatile __typeof__(*(p)) *)(p) = (n);                                 \
		else                                                                             \
			*(expected) = plain_old;                                                 \
		plain_same;                                                                      \
	})

#endif
