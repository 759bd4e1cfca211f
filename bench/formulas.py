"""What queueing theory says exactly: means and quantiles of the sojourn time that the engine is held against.

Poisson arrivals of rate `rate`, service times of a `Service`, infinite queues; the sojourn time is waiting plus service. Every time is in the unit of
the service's mean and every rate in its inverse. Every function raises ValueError at or beyond saturation. Books:
K1, K2 = Kleinrock, *Queueing Systems*, volume 1 (1975) and 2 (1976);
HB = Harchol-Balter, *Performance Modeling and Design of Computer Systems* (2013); N = Neuts, *Matrix-Geometric Solutions* (1981).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincc, ndtr

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Service:
    """A distribution of service times; `mean` is its mean."""

    mean: float

    def moment(self, k: int) -> float:
        """E[S^k]."""
        raise NotImplementedError

    def survival(self, x: float) -> float:
        """P(S > x)."""
        raise NotImplementedError

    def density(self, x: float) -> float:
        """The density at x; not for a fixed service time."""
        raise NotImplementedError

    def phases(self) -> tuple[Array, Array] | None:
        """The phase-type representation (initial row vector, subgenerator; N section 2.2), or None where there is no finite one."""
        return None

    @property
    def scv(self) -> float:
        """The squared coefficient of variation."""
        return self.moment(2) / self.mean**2 - 1


@dataclass(frozen=True)
class Fixed(Service):
    """Every service takes `mean`."""

    def moment(self, k: int) -> float:
        return self.mean**k

    def survival(self, x: float) -> float:
        return float(x < self.mean)


@dataclass(frozen=True)
class Exponential(Service):
    """The memoryless one."""

    def moment(self, k: int) -> float:
        return math.factorial(k) * self.mean**k

    def survival(self, x: float) -> float:
        return math.exp(-x / self.mean)

    def density(self, x: float) -> float:
        return math.exp(-x / self.mean) / self.mean

    def phases(self) -> tuple[Array, Array]:
        return np.array([1.0]), np.array([[-1 / self.mean]])


@dataclass(frozen=True)
class Erlang(Service):
    """The sum of `stages` exponentials of equal mean; scv = 1 / stages."""

    stages: int

    def moment(self, k: int) -> float:
        return (self.mean / self.stages) ** k * math.prod(range(self.stages, self.stages + k))

    def survival(self, x: float) -> float:
        return float(gammaincc(self.stages, x * self.stages / self.mean))

    def density(self, x: float) -> float:
        nu = self.stages / self.mean
        if x <= 0:
            return nu if self.stages == 1 else 0.0
        return math.exp(self.stages * math.log(nu) + (self.stages - 1) * math.log(x) - nu * x - math.lgamma(self.stages))

    def phases(self) -> tuple[Array, Array]:
        nu = self.stages / self.mean
        return np.eye(self.stages)[0], nu * (np.eye(self.stages, k=1) - np.eye(self.stages))


@dataclass(frozen=True)
class Hyperexponential(Service):
    """Exponential of mean `means[i]` with probability `shares[i]`; make one with `balance`."""

    shares: tuple[float, ...]
    means: tuple[float, ...]

    @classmethod
    def mix(cls, shares: tuple[float, ...], means: tuple[float, ...]) -> Hyperexponential:
        """The mixture of these branches; its mean follows."""
        if abs(sum(shares) - 1) > 1e-12:
            raise ValueError(f"the shares of a mixture sum to 1; got {shares}")
        return cls(sum(p * m for p, m in zip(shares, means, strict=True)), shares, means)

    @classmethod
    def balance(cls, mean: float, scv: float) -> Hyperexponential:
        """The two-branch one of this mean and scv >= 1 whose branches bring equal load ("balanced means")."""
        if scv < 1:
            raise ValueError(f"a hyperexponential has scv at least 1; got {scv}")
        p = (1 + math.sqrt((scv - 1) / (scv + 1))) / 2
        return cls(mean, (p, 1 - p), (mean / (2 * p), mean / (2 * (1 - p))))

    def moment(self, k: int) -> float:
        return math.factorial(k) * sum(p * m**k for p, m in zip(self.shares, self.means, strict=True))

    def survival(self, x: float) -> float:
        return sum(p * math.exp(-x / m) for p, m in zip(self.shares, self.means, strict=True))

    def density(self, x: float) -> float:
        return sum(p / m * math.exp(-x / m) for p, m in zip(self.shares, self.means, strict=True))

    def phases(self) -> tuple[Array, Array]:
        return np.array(self.shares), np.diag([-1 / m for m in self.means])


@dataclass(frozen=True)
class Lognormal(Service):
    """exp of a normal variable, with this mean and squared coefficient of variation `spread`."""

    spread: float

    @property
    def sigma(self) -> float:
        """The standard deviation of the logarithm."""
        return math.sqrt(math.log1p(self.spread))

    def moment(self, k: int) -> float:
        return float(self.mean**k * (1 + self.spread) ** (k * (k - 1) / 2))

    def survival(self, x: float) -> float:
        return 1.0 if x <= 0 else float(ndtr(-self._standardise(x)))

    def density(self, x: float) -> float:
        return 0.0 if x <= 0 else math.exp(-(self._standardise(x) ** 2) / 2) / (x * self.sigma * math.sqrt(2 * math.pi))

    def _standardise(self, x: float) -> float:
        return (math.log(x / self.mean) + self.sigma**2 / 2) / self.sigma


def fcfs_mean(service: Service, rate: float) -> float:
    """M/G/1 first come first served, mean sojourn: E[S] + rate E[S²] / (2(1-r)) (Pollaczek-Khinchine; K1 5.6, HB 23.5)."""
    return service.mean + rate * service.moment(2) / (2 * (1 - _load(service, rate)))


def ps_mean(service: Service, rate: float) -> float:
    """M/G/1 processor sharing, mean sojourn: E[S] / (1-r), whatever the distribution (K2 4.4, HB 30.2)."""
    return service.mean / (1 - _load(service, rate))


def srpt_mean(service: Service, rate: float) -> float:
    """M/G/1 shortest remaining processing time, mean sojourn (Schrage and Miller 1966; HB 33.1).

    A job of size x takes E[T(x)] = rate m(x) / (1 - r(x))² + ∫_0^x dt / (1 - r(t)), where r(x) = rate ∫_0^x t f(t) dt is the load of jobs up to x, and
    m(x) = (∫_0^x t² f(t) dt + x² P(S > x)) / 2 = ∫_0^x t P(S > t) dt. Averaged over f and integrated by parts, E[T] is the integral of
    P(S > t) / (1 - r(t)) + rate m(t) f(t) / (1 - r(t))², solved here as an ordinary differential equation with the partial integrals.
    """
    _load(service, rate)
    if isinstance(service, Fixed):
        return fcfs_mean(service, rate)  # what has begun is always the shortest, and the others are equal: the order is that of arrival

    def grow(x: float, so_far: Array) -> list[float]:
        area, half_square, _ = so_far
        tail = service.survival(x)
        spare = 1 - rate * (area - x * tail)
        return [tail, x * tail, tail / spare + rate * half_square * service.density(x) / spare**2]

    scale = service.mean
    end = scale
    while service.survival(end) * end**2 > 1e-13 * scale**2:
        end *= 1.25
    # From x = s² the steps stay fine near 0, where small jobs are, and grow into the tail.
    solution = solve_ivp(
        lambda s, y: [2 * s * slope for slope in grow(s * s, y)],
        (0, math.sqrt(end)),
        [0.0, 0.0, 0.0],
        method="DOP853",
        rtol=1e-10,
        atol=[1e-12 * scale, 1e-12 * scale**2, 1e-12 * scale],
        max_step=math.sqrt(scale) / 20,
    )
    return float(solution.y[2, -1])


def mmc_wait_probability(service: Exponential, rate: float, servers: int) -> float:
    """M/M/c: the probability of waiting, Erlang's C, through the recursion of Erlang's B (K1 3.5, HB 14.3)."""
    load = _load(service, rate, servers)
    offered = rate * service.mean
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def mmc_mean(service: Exponential, rate: float, servers: int) -> float:
    """M/M/c, mean sojourn: E[S] + C / (c mu - rate) (HB 14.5). It holds for every work-conserving order that does not know service times."""
    return service.mean + mmc_wait_probability(service, rate, servers) / (servers / service.mean - rate)


def mmc_survival(service: Exponential, rate: float, servers: int, t: float) -> float:
    """M/M/c first come first served: P(sojourn > t).

    Waiting is 0 with probability 1 - C and else exponential of rate a = c mu - rate; convolved with service (K1 3.5 and exercise 3.11):
    e^(-mu t) + C mu (e^(-mu t) - e^(-a t)) / (a - mu), here in a form that stays exact where a is near mu.
    """
    waits = mmc_wait_probability(service, rate, servers)
    mu = 1 / service.mean
    drain = servers * mu - rate
    gap = abs(drain - mu)
    both = -math.expm1(-gap * t) / gap if gap else t
    return math.exp(-mu * t) + waits * mu * math.exp(-min(mu, drain) * t) * both


def mmc_quantile(service: Exponential, rate: float, servers: int, q: float) -> float:
    """M/M/c first come first served: the q-quantile of the sojourn time; for one server -ln(1-q) / (mu - rate) (K1 5.7, HB 27.3)."""
    return _invert(lambda t: mmc_survival(service, rate, servers, t), q, service.mean)


def md1_quantile(service: Fixed, rate: float, q: float) -> float:
    """M/D/1 first come first served: the q-quantile of the sojourn time (waiting, by `md1_wait_survival`, plus the fixed service)."""
    return service.mean + _invert(lambda t: md1_wait_survival(service, rate, t), q, service.mean)


def md1_wait_survival(service: Fixed, rate: float, t: float) -> float:
    """M/D/1: P(waiting > t), by Franx, *A simple solution for the M/D/c waiting time distribution*, Operations Research Letters 29 (2001).

    With kD the first multiple of D above t and u = kD - t: P(W <= t) = e^(-rate u) sum_j Q_(k-1-j) (rate u)^j / j!, where Q_m is the probability of at
    most m waiting. Every term is positive; Erlang's form of 1909 alternates in sign and is lost to rounding after a few dozen services.
    """
    _load(service, rate)
    if t < 0:
        return 1.0
    k = math.floor(t / service.mean) + 1
    waiting = np.cumsum(_md1_states(service, rate, k + 1))[1:]  # Q_0 = P(at most one in system), Q_1, …
    u = rate * (k * service.mean - t)
    term = math.exp(-u)
    below = 0.0
    for j in range(k):
        below += float(waiting[k - 1 - j]) * term
        term *= u / (j + 1)
    return 1 - below


def fcfs_survival(service: Service, rate: float, t: float) -> float:
    """M/G/1 first come first served with fixed or phase-type service: P(sojourn > t), for the latter by a matrix exponential, exact to rounding.

    Waiting is phase-type (r beta, T + r t0 beta) for service (alpha, T), t0 = -T 1, beta the equilibrium vector of the phase: alpha (-T)^-1 / E[S]
    (N theorem 3.2.1 and section 5.3; K1 5.7 has the transform); the sojourn is its convolution with the service. Raises ValueError for others.
    """
    if isinstance(service, Fixed):
        return 1.0 if t < service.mean else md1_wait_survival(service, rate, t - service.mean)
    start, generator = _sojourn_phases(service, rate)
    return float(start @ expm(generator * t) @ np.ones(start.size))


def fcfs_quantile(service: Service, rate: float, q: float) -> float:
    """M/G/1 first come first served: the q-quantile of the sojourn time, for fixed and phase-type service. Raises ValueError for others."""
    if isinstance(service, Fixed):
        return md1_quantile(service, rate, q)
    start, generator = _sojourn_phases(service, rate)
    ones = np.ones(start.size)
    return _invert(lambda t: float(start @ expm(generator * t) @ ones), q, service.mean)


def fcfs_variance(service: Service, rate: float) -> float:
    """M/G/1 first come first served: n Var(mean sojourn of n successive jobs) / mean² for large n; it plans run lengths.

    By Poisson's equation of the workload V, solved by v² / (2(1-r)), the centred sum of sojourns is a martingale whose jump at an arrival is
    X = V + S - E[V + S] + rate (2 V S + S²) / (2(1-r)); the variance is E[X²]. Moments of V by Takács (K1 5.7). For M/M/1 it is Whitt's (1989).
    """
    load = _load(service, rate)
    s1, s2, s3, s4 = (service.moment(k) for k in (1, 2, 3, 4))
    v1 = rate * s2 / (2 * (1 - load))
    v2 = 2 * v1**2 + rate * s3 / (3 * (1 - load))
    g = rate / (2 * (1 - load))
    centred = (v2 - v1**2) + (s2 - s1**2)
    jump = 4 * v2 * s2 + 4 * v1 * s3 + s4
    both = 2 * v2 * s1 + v1 * s2 + 2 * v1 * s2 + s3 - (v1 + s1) * (2 * v1 * s1 + s2)
    return (centred + g**2 * jump + 2 * g * both) / (v1 + s1) ** 2


def mmc_variance(service: Exponential, rate: float, servers: int) -> float:
    """M/M/c, any work-conserving order that does not know service times: as `fcfs_variance`, and equal to it for one server.

    The asymptotic variance of the number in system N is that of a birth-death process (Whitt, *Asymptotic formulas for Markov processes*, Operations
    Research 40 (1992), proposition 1); Little's law turns it into that of sojourns, with Cov(integral of N, arrivals) = rate dE[N]/d rate.
    """
    load = _load(service, rate, servers)
    offered = rate * service.mean
    levels = servers + math.ceil(40 / -math.log(load)) if load else servers
    n = np.arange(levels + 1)
    weights = np.cumprod(np.concatenate([[1.0], offered / np.minimum(n[1:], servers)]))
    share = weights / weights.sum()
    number = mmc_mean(service, rate, servers) * rate
    excess = np.cumsum((n - number) * share)[:-1]
    spread = 2 * float(np.sum(excess**2 / share[:-1])) / rate  # per unit of time
    step = 1e-5 * min(rate, servers / service.mean - rate)
    slope = ((rate + step) * mmc_mean(service, rate + step, servers) - (rate - step) * mmc_mean(service, rate - step, servers)) / (2 * step)
    return rate * (spread / number**2 + 1 / rate - 2 * slope / number)


def tail_variance(survival: Callable[[float], float], t: float, q: float, variance: float, mean: float) -> float:
    """n Var(q-quantile of n successive sojourns) / quantile², for large n, roughly: it plans run lengths. `t` is the quantile itself.

    For independent sojourns it would be q(1-q) / (t f(t))² with the density f. Dependence multiplies it by the number of neighbours that one sojourn
    resembles, taken from the mean: `variance` (as of `fcfs_variance`) x mean² / Var(sojourn), exact in M/M/1 for the mean and near it for the tail.
    """
    step = 1e-4 * t
    density = (survival(t - step) - survival(t + step)) / (2 * step)
    # Var(sojourn) from its law: E[T²] is the integral of 2 t P(T > t).
    x, w = np.polynomial.legendre.leggauss(8)
    second = 0.0
    for k in range(30):
        a, b = k * t / 5, (k + 1) * t / 5
        at = (a + b) / 2 + (b - a) / 2 * x
        second += (b - a) / 2 * float(sum(weight * 2 * s * survival(s) for weight, s in zip(w, at, strict=True)))
    alike = max(1.0, variance * mean**2 / (second - mean**2))
    return q * (1 - q) / (t * density) ** 2 * alike


def _load(service: Service, rate: float, servers: int = 1) -> float:
    """The load r, a share of capacity. Raises ValueError unless 0 <= r < 1."""
    load = rate * service.mean / servers
    if servers < 1 or not 0 <= load < 1:
        raise ValueError(f"theory holds for at least 1 server and loads from 0 to below 1; got {servers} and {load}")
    return load


def _md1_states(service: Fixed, rate: float, n: int) -> Array:
    """M/D/1: the probabilities of 0 … n in system, by counting crossings of each level at departures (all terms positive; K1 5.6, N section 3.1)."""
    load = _load(service, rate)
    more = gammainc(np.arange(1, n + 2), load)  # more[k] = P(more than k arrivals in one service)
    states = np.empty(n + 1)
    states[0] = 1 - load
    for k in range(1, n + 1):
        up = states[0] * more[k - 1] + float(np.dot(states[1:k], more[k - 1 : 0 : -1]))
        states[k] = up * math.exp(load)
    return states


def _sojourn_phases(service: Service, rate: float) -> tuple[Array, Array]:
    """The phase-type representation of the M/PH/1 sojourn time; its missing initial mass is a sojourn of 0 and is 0."""
    load = _load(service, rate)
    phases = service.phases()
    if phases is None:
        raise ValueError(f"no finite phase-type form of {service}: there is no exact quantile for it here")
    alpha, inner = phases
    size = alpha.size
    exits = -inner.sum(axis=1)
    residual = np.linalg.solve(-inner.T, alpha) / service.mean
    waits = inner + load * np.outer(exits, residual)
    done = -waits.sum(axis=1)
    generator = np.block([[waits, np.outer(done, alpha)], [np.zeros((size, size)), inner]])
    return np.concatenate([load * residual, (1 - load) * alpha]), generator


def _invert(survival: Callable[[float], float], q: float, scale: float) -> float:
    """The t with P(> t) = 1 - q, or 0 where that holds at 0 already."""
    if not 0 < q < 1:
        raise ValueError(f"a quantile lies between 0 and 1, exclusive; got {q}")
    if survival(0.0) <= 1 - q:
        return 0.0
    end = scale
    while survival(end) > 1 - q:
        end *= 2
    return float(brentq(lambda t: survival(t) - (1 - q), 0.0, end, xtol=1e-13 * scale, rtol=1e-12))
