"""Files that a scenario names: whole and sensible, or refused with the line."""

import numpy as np
import pytest

from waveos.errors import ConfigError
from waveos.ipu_emulator.inputs import is_file, mean_service_ns, read_arrivals, read_samples
from waveos.scenario import Service

TRACE = "time_ns,class,service_ns\n100,GET,5000\n250,RANGE,90000\n250,GET,4000\n"


def write(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_trace_begins_at_zero_and_keeps_its_order(tmp_path):
    arrivals = read_arrivals(write(tmp_path, TRACE), ["GET", "RANGE"])
    assert arrivals.time_ns.tolist() == [0, 150, 150]
    assert arrivals.request_class.tolist() == [0, 1, 0]
    assert arrivals.service_ns.tolist() == [5000, 90000, 4000]


def test_columns_are_found_by_name(tmp_path):
    arrivals = read_arrivals(write(tmp_path, "class,extra,service_ns,time_ns\nGET,x,7,1\nGET,y,8,2\n"), ["GET"])
    assert arrivals.time_ns.tolist() == [0, 1]
    assert arrivals.service_ns.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TRACE[:-3], "trace.csv:4: the file ends in the middle of a line, so it may be cut off"),
        ("time_ns,class,service_ns\n1,GET,5\n2,GET\n", "trace.csv:3: 2 fields where 3 are named in the first line; is the file cut off?"),
        (TRACE.replace("4000", "-4000"), "trace.csv:4: service_ns = '-4000'; it is a whole number, 0 or more"),
        (TRACE.replace("250,G", "2.5,G"), "trace.csv:4: time_ns = '2.5'; it is a whole number, 0 or more"),
        (TRACE.replace("250,G", "50,G"), "trace.csv:4: time_ns goes back; sort the trace by time"),
        (TRACE.replace("RANGE", "RANG"), "trace.csv:3: no class 'RANG' in the scenario (did you mean 'RANGE'?); it has GET, RANGE"),
        (
            TRACE.replace("service_ns", "service"),
            "trace.csv:1: no column service_ns; the first line has to name the columns: time_ns, class, service_ns",
        ),
        ("time_ns,class,service_ns\n", "trace.csv: a trace needs at least two requests; this one has 0"),
        ("", "trace.csv:1: the file ends in the middle of a line"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path, text, told):
    with pytest.raises(ConfigError) as error:
        read_arrivals(write(tmp_path, text), ["GET", "RANGE"])
    assert told in str(error.value)


def test_a_trace_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"arrivals: there is no trace .*gone\.csv"):
        read_arrivals(tmp_path / "gone.csv", ["GET"])


def test_service_times_come_from_csv_and_npz(tmp_path):
    write(tmp_path, "service_ns\n5\n7\n", "times.csv")
    np.savez(tmp_path / "times.npz", get=np.array([3.2, 4.0]), range=np.array([9]))
    assert read_samples("times.csv", tmp_path).tolist() == [5, 7]
    assert read_samples("times.npz:get", tmp_path).tolist() == [3, 4]
    assert is_file("times.npz:get")
    assert not is_file("rocksdb:get")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("gone.csv", "there is no file"),
        ("times.npz:got", "has no array 'got' (did you mean 'get'?); it has get, square, nan, zero"),
        ("times.npz:square", "service times are one row of finite numbers, in ns"),
        ("times.npz:nan", "service times are one row of finite numbers, in ns"),
        ("times.npz:zero", "service times are nanoseconds, 0 or more and not all 0"),
        ("cut.npz:get", "is it cut off?"),
    ],
)
def test_broken_service_times_are_refused(tmp_path, spec, told):
    np.savez(tmp_path / "times.npz", get=np.array([3]), square=np.ones((2, 2)), nan=np.array([np.nan]), zero=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "times.npz").read_bytes()[:200])
    with pytest.raises(ConfigError) as error:
        read_samples(spec, tmp_path)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("service", "mean_ns"),
    [
        (Service(fixed_us=3.0), 3000),
        (Service(fixed_us=10.0, exponential_us=1.0), 11000),
        (Service(erlang_us=5.0, stages=3), 5000),
        (Service(hyperexponential_us=[1.0, 10.0], shares=[0.9, 0.1]), 1900),
        (Service(lognormal_us=4.0, sigma=2.0), 4000),
        (Service(samples="x", fixed_us=1.0), 3000),
    ],
)
def test_the_mean_of_a_service_time_is_what_its_keys_say(service, mean_ns):
    assert mean_service_ns(service, {"x": np.array([1000, 3000])}) == pytest.approx(mean_ns)
