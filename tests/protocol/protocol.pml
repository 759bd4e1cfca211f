/* The protocol between one host and one agent, small enough to be tried in every order.
 *
 * TASKS tasks wake, run and block by themselves. The host tells the agent over a bounded queue, the agent decides, and the host applies a decision only if the
 * task's sequence number is still the one it was made on. Messages overflow, the agent dies and comes again, the host does, and the link is lost, FAULTS
 * times in all, with what is under way kept, lost, or late. The numbers of messages, decisions and outcomes come from the enums in wave/ (-DNAME=number).
 *
 * What each part stands for is named as file:function beside it; a test looks whether it is there.
 *
 * Checked: `assert` (nothing stale is applied), no deadlock, and at rest no task waits that could run (no task is lost).
 * With FAULTS 2 and WAKES 2 that are 7.2 million states and 40 s; the test takes smaller ones.
 * -DNO_SEQ, -DNO_SESSION, -DNO_RESYNC, -DNO_REDELIVERY each leave out one precaution; then spin must find what goes wrong.
 */

#define TASKS 2
#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef WAKES
#define WAKES 2
#endif
#define ROOM 2

#define UNKNOWN 0
#define BLOCKED 1
#define RUNNABLE 2
#define STAGED 3
#define RUNNING 4

chan messages = [ROOM] of { byte, byte, byte, byte, byte }; /* session, type, task, seq, outcome: wave/ring.py:send, wave/link/session.py:data */
chan txns = [ROOM] of { byte, byte, byte, byte };           /* session, type, task, seq */

byte session = 1;        /* the host's: wave/link/zmq.py:_begin; on one machine a ring's generation: wave/ring.py:restarted */
byte heard_session = 1;  /* the agent's: wave/link/exchange.py:greet */
byte state[TASKS];       /* the truth */
byte seq[TASKS];
byte replay = TASKS + 1; /* TASKS + 1: nothing to replay; 0: RESYNC comes next; n: task n - 1 does */
byte faults, woken;

byte belief[TASKS];      /* the agent's: wave/sched/laws.py:feed */
byte belief_seq[TASKS];

inline begin_replay() { /* host/sched/wave.bpf.h:resync */
#ifdef NO_RESYNC
    skip
#else
    replay = 0
#endif
}

inline say(type, task, outcome) { /* the queue is never waited for: wave/ring.py:_count_overflow */
    if
    :: replay <= task -> skip /* the replay will tell it */
    :: replay > task && nfull(messages) -> messages!session, type, task, seq[task], outcome
    :: replay > task && full(messages) -> begin_replay()
    fi
}

inline apply(task, number) { /* host/sched/wave.bpf.h:judge */
    if
#ifdef NO_SEQ
    :: state[task] != RUNNING ->
#else
    :: seq[task] == number ->
#endif
        assert(state[task] == RUNNABLE); /* what it was decided on is so still */
        state[task] = RUNNING;
        seq[task]++;
        say(TXN_OUTCOME, task, COMMITTED)
    :: seq[task] == number && faults < FAULTS -> /* it is as it was, but its CPU is not to be had: host/sched/wave.bpf.h:answer */
        faults++;
        say(TXN_OUTCOME, task, CPU_UNAVAILABLE)
    :: else -> say(TXN_OUTCOME, task, STALE)
    fi
}

inline lose_some() { /* each record under way arrives all the same, late, or does not: in the order in which it was sent */
    n = len(messages);
    do
    :: n > 0 -> messages?s, type, t, number, out; n--; if :: messages!s, type, t, number, out :: skip fi
    :: n == 0 -> break
    od;
    n = len(txns);
    do
    :: n > 0 -> txns?s, type, t, number; n--; if :: txns!s, type, t, number :: skip fi
    :: n == 0 -> break
    od
}

active proctype Host() {
    byte s, type, t, number, out, n;
    atomic { t = 0; do :: t < TASKS -> state[t] = BLOCKED; seq[t] = 1; t++ :: else -> break od; begin_replay(); t = 0 }
end:
    do
    :: atomic { woken < WAKES -> /* a task wakes */
        if :: t = 0 :: t = TASKS - 1 fi;
        if
        :: state[t] == BLOCKED -> woken++; state[t] = RUNNABLE; seq[t]++; say(THREAD_RUNNABLE, t, 0)
        :: else -> skip
        fi }
    :: atomic { state[0] == RUNNING -> state[0] = BLOCKED; seq[0]++; say(THREAD_BLOCKED, 0, 0) }
    :: atomic { state[1] == RUNNING -> state[1] = BLOCKED; seq[1]++; say(THREAD_BLOCKED, 1, 0) }
    :: atomic { txns?s, type, t, number ->
        if
#ifdef NO_SESSION
        :: true -> apply(t, number)
#else
        :: s == session -> apply(t, number)
        :: s != session -> skip /* wave/link/zmq.py:_hear counts it as stale */
#endif
        fi }
    :: atomic { replay <= TASKS && nfull(messages) -> /* the whole state, as there is room */
        if
        :: replay == 0 -> messages!session, RESYNC, 0, 0, 0
        :: else -> messages!session, THREAD_NEW, replay - 1, seq[replay - 1], state[replay - 1]
        fi;
        replay++ }
    :: atomic { faults < FAULTS -> faults++; /* the link is lost, and both sides open another session: wave/link/zmq.py:_break */
        lose_some(); session++; begin_replay() }
    :: atomic { faults < FAULTS -> faults++; /* the agent dies and another comes, which knows nothing: wave/ring.py:join_consumer */
        t = 0; do :: t < TASKS -> belief[t] = UNKNOWN; t++ :: else -> break od; t = 0;
        begin_replay() }
    :: atomic { faults < FAULTS -> faults++; /* the host dies and another comes, which counts anew; tasks live on: host/restore.py:restore */
        lose_some(); session++;
        t = 0; do :: t < TASKS -> seq[t] = 1; if :: state[t] == RUNNING -> state[t] = RUNNABLE :: else -> skip fi; t++ :: else -> break od; t = 0;
        begin_replay() }
    od
}

active proctype Agent() {
    byte s, type, t, number, out;
end:
    do
    :: atomic { messages?s, type, t, number, out ->
        if
        :: s < heard_session -> skip /* of a session that is over */
        :: else ->
            heard_session = s;
            if
            :: type == RESYNC -> t = 0; do :: t < TASKS -> belief[t] = UNKNOWN; t++ :: else -> break od /* wave/sched/laws.py:_reset */
            :: type == THREAD_NEW -> belief[t] = out; belief_seq[t] = number
            :: type == THREAD_RUNNABLE -> belief[t] = RUNNABLE; belief_seq[t] = number
            :: type == THREAD_BLOCKED -> belief[t] = BLOCKED; belief_seq[t] = number
            :: type == TXN_OUTCOME && out == COMMITTED -> belief[t] = RUNNING; belief_seq[t] = number
            :: type == TXN_OUTCOME && out != COMMITTED -> /* wave/sched/laws.py:_settle_outcome */
#ifndef NO_REDELIVERY
                if
                :: belief[t] == STAGED -> belief[t] = RUNNABLE; belief_seq[t] = number
                :: else -> skip
                fi
#else
                skip
#endif
            fi
        fi;
        t = 0 }
    :: atomic { belief[0] == RUNNABLE && nfull(txns) -> txns!heard_session, RUN, 0, belief_seq[0]; belief[0] = STAGED } /* wave/sched/laws.py:_stage */
    :: atomic { belief[1] == RUNNABLE && nfull(txns) -> txns!heard_session, RUN, 1, belief_seq[1]; belief[1] = STAGED }
    od
}

active proctype Rest() { /* when nothing more can happen */
end:
    do
    :: timeout ->
        assert(replay == TASKS + 1 && state[0] == BLOCKED && state[1] == BLOCKED);
        break
    od
}
