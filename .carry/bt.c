#define _GNU_SOURCE
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>
#include <stdio.h>
static void h(int s){ void*a[60]; int n=backtrace(a,60); backtrace_symbols_fd(a,n,2); _exit(139);}
__attribute__((constructor)) static void init(){ void*a[1]; backtrace(a,1); static char st[65536]; stack_t ss={.ss_sp=st,.ss_size=sizeof st}; sigaltstack(&ss,0); struct sigaction sa={.sa_handler=h,.sa_flags=SA_ONSTACK}; sigaction(SIGSEGV,&sa,0);}
