/*
 * Preloaded into linux.uml, so that it starts on processors with more register state than it knows.
 *
 * User-mode Linux 6.1 keeps 2696 bytes of extended register state (up to AVX-512 and PKRU) for each of its tasks. The
 * host's PTRACE_SETREGSET takes nothing but the whole state of the processor (xstateregs_set() in the kernel answers
 * EFAULT), which is 11008 bytes where there is AMX; the guest then dies with "ptrace set fp regs failed, errno = 14".
 * Here the missing end is added: zeros, and the header at the front says that none of it is in use. It never is:
 * the guest's tasks cannot ask the host for leave to use AMX.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static unsigned char state[1 << 16] __attribute__((aligned(64)));
static size_t state_size; /* of this processor; 0: not asked yet */

static long set_state(pid_t pid, const struct iovec *given)
{
	struct iovec whole = { .iov_base = state, .iov_len = sizeof(state) };

	if (!state_size && !syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, &whole)) {
		state_size = whole.iov_len;
		memset(state, 0, sizeof(state));
	}
	if (given->iov_len >= state_size)
		return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, given);
	memcpy(state, given->iov_base, given->iov_len);
	whole.iov_len = state_size;
	return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, &whole);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE)
		return set_state(pid, data);
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		long word; /* the system call stores what the C library's function returns */
		if (syscall(SYS_ptrace, request, pid, address, &word))
			return -1;
		errno = 0;
		return word;
	}
	return syscall(SYS_ptrace, request, pid, address, data);
}
