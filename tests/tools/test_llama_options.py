"""tools/llama_options.py on sources in llama.cpp's syntax, and the state of the data file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import llama_options
from tools.llama_options import Option, Options, differences, of_bench, of_common, recorded

COMMON = r"""
context init() {
    const list<enum llama_example> sound_examples = {LLAMA_EXAMPLE_TTS, LLAMA_EXAMPLE_CLI};
    auto add_opt = [&](common_arg arg) { options.push_back(arg); };
    add_opt(common_arg(
        {"-a", "--apple"},
        "a switch, or \"flag\", with (brackets, and) {braces}",
        [](common_params & params) {
            params.apple = true;
        }
    ));
    add_opt(common_arg(
        // a note, with {"-x"} in it
        {"-b", "--pear"}, "N",
        string_format("a number (default: %d)", f(params.pear, 2)),
        [](common_params & params, int value) { params.pear = value; }
    ).set_env("PEAR").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"-b", "--pear"}, "N", "the same elsewhere",
        [](common_params & params, int value) { params.pear = value; }
    ).set_excludes({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg({ "--plum" }, { "-np", "--no-plum" }, "yes or no // not a comment",
        [](common_params & params, bool value) { params.plum = value; }
    ).set_examples(sound_examples));
    add_opt(common_arg(
        {"--range"}, "START", "END",
        "two values",
        [](common_params & /* unused */, const std::string & a, const std::string & b) { g(a, b); }
    ));
}
void presets() {
    args.push_back(common_arg({"--later"}, "N", "no option", [](common_params &, int) {}));
}
"""
BENCH = r"""
        if (arg == "-h" || arg == "--help") {
            usage();
        } else if (arg == "-b" || arg == "--pear") {
            if (++i >= argc) {
                invalid = true;
                break;
            }
            auto p = split(argv[i]);
        } else if (has_plums() && (arg == "-q" || arg == "--plum")) {
            if (++i >= argc) {
                break;
            }
        } else if (arg == "--last") {
            last = true;
        } else {
            invalid = true;
            i++;
        }
"""
OF_COMMON: Options = {
    Option(("-a", "--apple"), 0): {"common"},
    Option(("-b", "--pear"), 1): {"common", "server"},
    Option(("--plum",), 0): {"tts", "cli"},
    Option(("-np", "--no-plum"), 0): {"tts", "cli"},
    Option(("--range",), 2): {"common"},
}
OF_BENCH: Options = {
    Option(("-h", "--help"), 0): {"llama-bench"},
    Option(("-b", "--pear"), 1): {"llama-bench"},
    Option(("-q", "--plum"), 1): {"llama-bench"},
    Option(("--last",), 0): {"llama-bench"},
}


def test_sources_are_understood() -> None:
    assert of_common(COMMON) == OF_COMMON
    assert of_bench(BENCH) == OF_BENCH


def test_every_difference_is_seen() -> None:
    ours = dict(OF_COMMON)
    assert differences(ours, OF_COMMON) == []
    del ours[Option(("-a", "--apple"), 0)]
    ours[Option(("--range",), 1)] = ours.pop(Option(("--range",), 2))
    ours[Option(("--plum",), 0)] = {"cli"}
    assert differences(ours, OF_COMMON) == [
        "missing: --range (2 values)",
        "missing: -a,--apple (0 values)",
        "programs of --plum (0 values): expected cli,tts, got cli",
        "surplus: --range (1 values)",
    ]


def test_the_exit_status_says_whether_anything_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("common/arg.cpp", COMMON), ("tools/llama-bench/llama-bench.cpp", BENCH)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    both = OF_COMMON | OF_BENCH
    both[Option(("-b", "--pear"), 1)] = {"common", "server", "llama-bench"}
    monkeypatch.setattr(llama_options, "recorded", lambda: both)
    assert llama_options.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "8 options, 0 differences\n"
    monkeypatch.undo()
    assert llama_options.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "missing: -a,--apple (0 values)\n" in out
    assert "surplus: --mmproj-auto (0 values)\n" in out


def test_earlier_options_are_not_compared() -> None:
    options = recorded()
    assert Option(("-hf", "-hfr", "--hf-repo"), 1) in options
    assert Option(("--mlock",), 0) not in options
