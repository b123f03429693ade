# ruff: noqa: E501
r"""Answers judged by hand: what the verifier has to say of each, and why.

Every pair is (gold answer, stated answer), in blocks that share a topic, a verdict and the reason for
it. A pair is judged in both directions with the same verdict unless its block is `one_way`. `SOURCED`
names published errors of math-verify by issue number; `TEXTS` are whole completions.
"""

from __future__ import annotations

from dataclasses import dataclass

RIGHT, WRONG, UNJUDGED = "right", "wrong", "unjudged"


@dataclass(frozen=True)
class Block:
    topic: str
    verdict: str
    why: str
    pairs: tuple[tuple[str, str], ...]
    one_way: bool = False


def _block(topic, verdict, why, *pairs, one_way=False):
    return Block(topic, verdict, why, pairs, one_way)


BLOCKS = [
    # ----------------------------------------------------------------- plain numbers
    _block("numbers", RIGHT, "leading and trailing zeros and a plus sign say nothing",
        ("5", "5.0"), ("5", "05"), ("5", "+5"), ("0.5", ".5"), ("18.90", "18.9"), ("-3", "-3.00"),
        ("27", "27."), ("0", "-0"), ("7", "{7}"), ("007", "7"), ("2.50", "2.5"), ("100", "100.000")),
    _block("numbers", RIGHT, "thousands may be grouped in any usual way",
        ("1234567", "1,234,567"), ("10,080", r"10,\!080"), ("10080", r"10{,}080"), ("10080", r"10\,080"),
        ("11111111100", r"11,\! 111,\! 111,\! 100"), ("1,250.5", "1250.5"), ("300000", "300,000"),
        ("1000", r"1\ 000")),
    _block("numbers", RIGHT, "a fraction is its value, however it is written",
        (r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", "1/2"), (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac 59", r"\frac{5}{9}"), (r"\frac9{19}", r"\tfrac{9}{19}"), ("3/4", r"\frac{6}{8}"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"), (r"\frac{3}{-4}", "-0.75"), ("½", r"\frac{1}{2}"),
        (r"\frac{17}{50}", "0.34"), ("7", r"\frac{14}{2}"), (r"\frac{-1}{1997}", r"-\frac{1}{1997}"),
        ("2/4", ".50"), (r"\frac{0.5}{2}", "0.25"), (r"-\frac{1}{3}", r"-1/3")),
    _block("numbers", RIGHT, "a mixed number is a sum",
        (r"1\frac{4}{5}", r"\frac{9}{5}"), (r"137 \frac{1}{2}", "137.5"), ("1 1/2", "1.5"),
        (r"-2\frac{1}{4}", "-2.25"), (r"3\frac12", "7/2")),
    _block("numbers", RIGHT, "a decimal of six digits or more stands for what rounds to it",
        (r"\frac{1}{3}", "0.333333"), (r"\frac{2}{3}", "0.666667"), (r"\frac{100}{3}", "33.3333"),
        (r"\sqrt{17}", "4.123106"), (r"\sqrt{17}", "4.123105625617661"), (r"\pi", "3.14159265"),
        (r"\frac{10}{81}", "0.12345679"), (r"\sqrt{2}", "1.414214"), (r"\frac{1}{7}", "0.142857"),
        (r"\ln 2", "0.693147"), (r"\frac{1}{3000}", "0.000333333")),
    _block("numbers", RIGHT, "repeating decimals are exact",
        (r"0.\overline{3}", r"\frac{1}{3}"), (r"0.1\overline{6}", "1/6"), (r"0.\overline{9}", "1"),
        (r"2.\overline{45}", r"\frac{27}{11}")),
    _block("numbers", RIGHT, "a computed float carries its rounding error",
        ("0.3", "0.30000000000000004"), ("3", "2.9999999999999996")),
    _block("numbers", WRONG, "another number",
        ("5", "6"), ("5", "-5"), ("5", "50"), ("5", "5.1"), ("0.5", "0.05"), ("72", "27"),
        ("1234", "1,235"), ("100", "1000"), ("10,080", "10.080"), (r"\frac{1}{2}", r"\frac{2}{1}"),
        (r"\frac{3}{4}", r"-\frac{3}{4}"), (r"1\frac{4}{5}", r"\frac{4}{5}"), ("3.14", "3.141"),
        ("1", "1.0000001"), ("1000000", "1000001"), ("1000000", "1000000.5"), ("0", "0.0000001"),
        ("123456789", "123456788"), ("2021", "-2021"), ("13/52", "1/3")),
    _block("numbers", WRONG, "a decimal of few digits is not the fraction it is near",
        (r"\frac{1}{3}", "0.33"), (r"\frac{1}{3}", "0.333"), (r"\frac{2}{3}", "0.67"),
        (r"\frac{2}{3}", "0.6666"), (r"\pi", "3.14"), (r"\frac{22}{7}", "3.14"), (r"\sqrt{2}", "1.41"),
        (r"\sqrt{17}", "4.12"), (r"\frac{1}{7}", "0.14"), ("1/16", "0.06")),
    _block("numbers", WRONG, "a digit of a long decimal is off",
        (r"\frac{1}{3}", "0.333343"), (r"\sqrt{17}", "4.123206"), (r"\pi", "3.14159365"),
        (r"\frac{2}{3}", "0.666677")),
    # ----------------------------------------------------------------- scientific and tiny
    _block("scientific notation", RIGHT, "mantissa times a power of ten, in any spelling",
        (r"8.7 \times 10^{8}", "8.7e8"), (r"8.7 \times 10^{8}", "870000000"), ("8.7e8", "870,000,000"),
        (r"3 \cdot 10^5", "300,000"), ("1e3", "1000"), (r"4.5 \times 10^{33}", "4.5e33"),
        (r"1 \times 10^{-5}", "0.00001"), (r"10^{-5}", "1e-5"), ("10^5", "100000"),
        (r"2.7778 \times 10^{-6}", "0.0000027778"), ("6.02E23", r"6.02 \times 10^{23}"),
        (r"-1.5 \times 10^{3}", "-1500"), (r"5\cdot10^{-1}", r"\frac{1}{2}"), ("1.0e0", "1"),
        (r"9.11×10^{-31}", "9.11e-31"), (r"3.0 * 10^8", "3e8"), ("8.7×10⁸", "870000000")),
    _block("scientific notation", WRONG, "another mantissa or another power",
        (r"8.7 \times 10^{8}", "8.7e7"), (r"8.7 \times 10^{8}", "8.8e8"), (r"8.7 \times 10^{8}", "8.7"),
        (r"8.7 \times 10^{8}", "87"), ("1e3", "1001"), (r"10^{-5}", "10^{5}"), ("6.02e23", "6.02e-23"),
        (r"3 \times 10^{8}", "3.1 \\times 10^{8}"), (r"4.5 \times 10^{33}", r"4 \times 10^{33}")),
    _block("tiny numbers", WRONG, "both are nearly 0 and yet not equal",
        (r"1.325 \times 10^{-27}", r"5 \times 10^{-30}"), ("1e-20", "2e-20"), ("0.0000001", "0.0000002"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        (r"9.11 \times 10^{-31}", r"1.67 \times 10^{-27}"), ("1e-9", "0"), (r"10^{-100}", "0"),
        (r"\frac{1}{3000}", "0.000333"), ("2^{-100}", "3^{-100}"),
        (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
        (r"6.6\times10^{-34}", r"6.7\times10^{-34}")),
    _block("tiny numbers", RIGHT, "the same, however tiny",
        (r"1.325 \times 10^{-27}", "1.325e-27"), (r"\frac{1}{2^{99}}", "2^{-99}"), ("1e-9", "0.000000001"),
        (r"\frac{1}{10^{30}}", "1e-30"), (r"5 \times 10^{-30}", r"0.5 \times 10^{-29}")),
    # ----------------------------------------------------------------- percentages
    _block("percentages", RIGHT, "the sign may be left out, or worked in",
        (r"50\%", "50"), (r"50\%", "0.5"), (r"50\%", r"\frac{1}{2}"), (r"62.5%", "62.5"), (r"8 \%", "8"),
        (r"8\%", "0.08"), (r"15\%", "15 percent"), (r"15\%", r"15\text{ percent}"), (r"12.5\%", "1/8"),
        (r"100\%", "1"), (r"33\%", r"33\%"), (r"-5\%", "-0.05"), (r"20 \%", "20%")),
    _block("percentages", WRONG, "another share",
        (r"50\%", r"5\%"), (r"50\%", "5"), (r"50\%", "0.05"), ("0.5", "50"), ("50", "0.5"),
        (r"8\%", "0.8"), (r"8\%", r"80\%"), (r"100\%", "0.1"), (r"0.5\%", r"50\%"), ("25", r"75\%"),
        (r"12.5\%", "12")),
    # ----------------------------------------------------------------- units
    _block("units", RIGHT, "a unit may be left out on one side",
        (r"5\text{ cm}", "5"), ("5", r"5\text{ cm}"), (r"864 \mbox{ inches}^2", "864"),
        (r"15\mbox{ cm}^2", "15"), (r"5.4 \text{ cents}", "5.4"), (r"\$32,\!348", "32348"),
        (r"\$18.90", "18.9"), ("36", r"\$36"), ("42", "42 apples"), ("60", "60 miles per hour"),
        ("5", "5m"), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"), (r"90^\circ", "90"),
        ("12", r"12\text{ hours}"), (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}"), ("7", "7 dollars"),
        (r"4^{\circ}", "4"), (r"2\pi\text{ m}", r"2\pi")),
    _block("units", RIGHT, "the same unit in another spelling",
        (r"5\text{ cm}", "5 centimeters"), (r"5 \text{ m}", "5m"), ("60 mph", "60 miles per hour"),
        (r"15\text{ cm}^2", "15 square centimeters"), (r"15\text{ cm}^2", r"15\text{ cm}^{2}"),
        (r"9.8\text{ m/s}^2", "9.8 m/s^2"), (r"90^\circ", "90 degrees"), (r"90^{\circ}", "90°"),
        (r"\$5", "5 dollars"), ("3 apples", "3 apple"), (r"8\text{ feet}", r"8\text{ ft}"),
        (r"2\text{ hours}", "2 h"), (r"7\text{ kg}", r"7\mathrm{kg}")),
    _block("units", RIGHT, "the same quantity in another unit",
        (r"5 \text{ m}", "500 cm"), (r"1 \text{ km}", "1000 m"), ("2 hours", "120 minutes"),
        (r"\$5", "500 cents"), ("1.5 kg", "1500 g"), ("36 km/h", r"10\text{ m/s}"), ("1 foot", "12 inches"),
        (r"1\text{ m}^2", r"10000\text{ cm}^2"), ("3 liters", "3000 ml"), (r"0.5\text{ cm}", "5 mm"),
        (r"180^\circ", r"\pi"), (r"90^\circ", r"\frac{\pi}{2}")),
    _block("units", WRONG, "another unit, or another number of it",
        (r"5\text{ cm}", r"6\text{ cm}"), (r"5 \text{ cm}", r"5\text{ m}"), (r"5\text{ cm}", r"5\text{ kg}"),
        ("60 mph", "60 km/h"), (r"15\text{ cm}^2", r"15\text{ cm}"), (r"15\text{ cm}^2", r"15\text{ cm}^3"),
        (r"\$5", "5 cents"), ("2 hours", "2 minutes"), ("1 km", "100 m"), (r"90^\circ", r"\frac{\pi}{3}"),
        (r"30^\circ", "60"), ("42 apples", "43 apples"), ("42 apples", "43"), ("5 m", "50 cm"),
        (r"180^\circ", r"2\pi")),
    _block("units", UNJUDGED, "the numbers agree, and nobody can tell whether what they count does",
        ("5 apples", "5 fruits"), ("12 students", "12 pupils"), (r"7\text{ boxes}", r"7\text{ crates}")),
    # ----------------------------------------------------------------- several answers
    _block("several answers", RIGHT, "a list knows no order and several separators",
        ("1, 2", "2, 1"), ("1,-2", "-2,1"), ("3, 5, 7", "7, 3 and 5"), ("1331 and 1728", "1728, 1331"),
        ("1, 2", r"1 \text{ and } 2"), ("1, 2", r"2\text{ or }1"), ("x=1, x=2", "1, 2"),
        ("x=1 or x=2", "x=2, x=1"), ("69, 84", "84; 69"), (r"\frac{1}{2}, 3", "3, 0.5"),
        ("5,-2", "-2.0, 5"), (r"\{1,2\}", "1, 2"), ("1, 2", r"\{2, 1\}"), ("100, 200", "100,200"),
        ("100,200", "200, 100"), ("1,2,3", r"1,\, 2,\, 3"), (r"32, \frac{1}{2}", "0.5, 32"),
        ("x=1, 2", "1, 2"), ("2400, 1350, 864", "864, 1350, 2400"), ("-2,-2", "-2, -2")),
    _block("several answers", RIGHT, "plus-minus is two answers",
        (r"\pm 2", "2, -2"), (r"\pm 2", "-2 or 2"), (r"x = \pm 3", "3, -3"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), (r"3 \pm 2 \sqrt{2}", r"3-2\sqrt2, 3+2\sqrt2"),
        (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt{5}, 1+\sqrt{5}"), ("±2", r"\{-2, 2\}")),
    _block("several answers", WRONG, "some of the answers are not all of them",
        ("1331 and 1728", "1728"), ("1, 2", "1"), ("1, 2, 3", "1, 2"), (r"\pm 2021", "2021"),
        (r"\pm 2", "2"), ("3, 5, 7", "3, 5"), (r"\{1,2\}", r"\{1\}"), ("x=1 or x=2", "x=1"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"), ("-2,-2", "-2")),
    _block("several answers", WRONG, "one answer among others is a guess",
        ("1", "1, 2"), ("5x", "5x, 6x"), ("5x", "$5x$ or $6x$"), ("5x", "$5x$, $6x$"), ("10", "10 or 11"),
        ("7", r"\{6,7,8\}"), ("72", "71, 72, 73"), ("2", r"\pm 2"), (r"\frac{1}{2}", r"\frac{1}{2}, 1")),
    _block("several answers", WRONG, "one of them differs",
        ("1, 2", "1, 3"), ("2, 3, 4", "1, 2, 3"), ("n=2, 3, 4", "n=1, 2, 3"), (r"\{1,2\}", r"\{1,3\}"),
        (r"19, 46, \text{ and } 82", "21, 36, and 82"), (r"\pm 2", "2, -3"), ("1,1,2", "1,2,2"),
        (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{17}"), ("5,-2", "-5, 2"),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1")),
    # ----------------------------------------------------------------- tuples, matrices
    _block("tuples", RIGHT, "the same entries in the same order",
        ("(1,2)", "(1, 2)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"), ("(6,31,-1)", "(6, 31, -1.0)"),
        (r"\left( \frac{3}{2}, -13 \right)", "(1.5,-13)"), ("(1,1), (3,2)", "(3,2), (1,1)"),
        ("(1,1), (3,2)", r"\{(3,2),(1,1)\}"), ("(1,2)", r"\{(1,2)\}"), ("(1,2)", "1,2"),
        (r"(\frac{1}{4}, \frac{1}{27})", r"(0.25, 1/27)"), ("(x,y)=(1,2)", "(1,2)"),
        ("(6,3),(9,3),(9,5)", "(9,5), (6,3), (9,3)"), ("x=1, y=2", "(1,2)"), ("x=1, y=2", "y=2, x=1"),
        (r"(22+8\sqrt6, 22-8\sqrt6)", r"(22+\sqrt{384}, 22-\sqrt{384})")),
    _block("tuples", WRONG, "order counts, and so does every entry",
        ("(1,2)", "(2,1)"), ("(1,2)", "(1,3)"), ("(1,2)", "(1,2,3)"), ("(1,2)", "1"), ("(1,2)", r"\{1,2\}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{2\pi}{3})"), ("(1,1), (3,2)", "(1,1)"),
        ("(1,1), (3,2)", "(1,3), (1,2)"), ("(1,2)", "2,1"), ("x=1, y=2", "2, 1"), ("x=1, y=2", "x=2, y=1"),
        ("(0, 1)", "(0, 1.5)"), ("D = (0, 1)", "D = (0, 1.5)"), ("(-2,1)", "(2,-1)")),
    _block("matrices", RIGHT, "the same entries, whatever the brackets",
        (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{bmatrix}-2\\-14\\-7\end{bmatrix}"),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
         r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \frac{5}{3} \end{pmatrix}"),
        (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}-1.0&0\\0&-1\end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}")),
    _block("matrices", WRONG, "another entry, shape or order",
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
        (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "3")),
    # ----------------------------------------------------------------- sets and intervals
    _block("sets", RIGHT, "the same elements",
        (r"\{1,2,3\}", r"\{3,2,1\}"), (r"\{1,2\}", r"\left\{ 1, 2 \right\}"), (r"\{1,1,2\}", r"\{1,2\}"),
        (r"\emptyset", r"\varnothing"), (r"\{\}", r"\emptyset"), (r"\{0.5\}", r"\frac{1}{2}"),
        (r"\{\frac{1}{3}\}", r"\{0.333333\}"), (r"\{ \sqrt{4}, 3 \}", r"\{2, 3\}")),
    _block("sets", WRONG, "other elements",
        (r"\{1,2,3\}", r"\{1,2\}"), (r"\{1,2\}", r"\{1,4\}"), (r"\emptyset", r"\{0\}"), (r"\{1\}", r"\{2\}"),
        (r"\{(1,2)\}", r"\{(2,1)\}")),
    _block("intervals", RIGHT, "an interval and an inequality say the same, in both directions",
        ("(3,4]", "3 < x \\le 4"), ("[1,2)", r"1 \le x < 2"), (r"(2,\infty)", "x > 2"), ("x > 2", r"(2,\infty)"),
        (r"(-\infty, 3)", "x<3"), ("x < 3", r"(-\infty, 3)"), ("(0, 12.5)", "0 < x < 12.5"),
        (r"[2,\infty)", r"k \geqslant 2"), (r"x \in [-2,7]", "[-2,7]"), (r"x \in [-2,7]", r"-2 \leq x \leq 7"),
        (r"m \geq \sqrt{2}", r"m \in [\sqrt{2}, +\infty)"), ("2 < x", "x > 2"), (r"4 > x \ge 3", "[3,4)"),
        (r"\mathbb{R}", r"(-\infty,\infty)"), (r"(-\infty, 0]", r"x \le 0"), ("x>=2", r"[2,\infty)")),
    _block("intervals", RIGHT, "the same ends, and unions in any order",
        (r"\left(\frac{3}{5},\frac{8}{3}\right]", r"(0.6, \frac83]"), (r"[\frac{1}{2}, 8]", "[0.5,8]"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty,2)"),
        (r"(-\infty, 2) \cup (3, \infty)", "x<2 or x>3"), (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"),
        (r"(-\infty, 0) \cup\{1\}", r"\{1\} \cup (-\infty,0)"),
        (r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]", r"[\pi^2/8, 1.25\pi^2]"),
        (r"(-\sqrt{3}, \sqrt{3})", r"(-\sqrt3,\sqrt3)"), ("(0,4]", "(0, 4]")),
    _block("intervals", WRONG, "open is not closed",
        ("[1,2)", "[1,2]"), ("(1,2)", "[1,2]"), ("(3,4]", "[3,4)"), ("x > 2", r"x \ge 2"),
        (r"[2,\infty)", "x>2"), (r"(-\infty, 0]", r"(-\infty,0)"), ("(1,2)", r"1 \le x \le 2"),
        (r"(0,9) \cup (9,36)", r"(0,9] \cup (9,36)")),
    _block("intervals", WRONG, "other ends, or another part of the line",
        ("[1,2)", "[1,3)"), ("x > 2", "x < 2"), (r"(2,\infty)", r"(-\infty,2)"), ("(0,4]", "(0,5]"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)"), (r"(-\infty, 2) \cup (3, \infty)", "2<x<3"),
        ("[1,2]", "1"), (r"\mathbb{R}", r"(0,\infty)"), ("(3,4]", "4"), (r"k \ge 2", r"k \ge 3"),
        (r"(-\infty,-5)", r"(-5,\infty)")),
    # ----------------------------------------------------------------- expressions
    _block("expressions", RIGHT, "the same value",
        (r"3\sqrt{13}", r"\sqrt{117}"), (r"11\sqrt2", r"11 \sqrt{2}"), (r"70 \sqrt{2}", r"\frac{140}{\sqrt2}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"288 \pi", r"\pi \cdot 288"), ("6 - 5i", "-5i+6"),
        (r"\frac{3\sqrt{3}}{4}", r"0.75\sqrt{3}"), ("2^{1009}", "2 \\cdot 2^{1008}"), (r"18+2\pi", r"2(\pi+9)"),
        (r"\frac{100!}{2^{50}}", r"100! \cdot 2^{-50}"), (r"\frac{8}{\sqrt[3]{7}}", r"8 \cdot 7^{-1/3}"),
        (r"1-\frac{1}{e}", r"\frac{e-1}{e}"), (r"\sqrt{51}", "51^{1/2}"), (r"\log_2 8", "3"),
        (r"-\log _{10} 250", r"-\frac{\ln 250}{\ln 10}"), (r"\frac{20000}{\pi}", r"20000/\pi"), ("4!", "24"),
        (r"\binom{5}{2}", "10"), (r"\sin 30^\circ", r"\frac{1}{2}"), ("2^{10}", "1024")),
    _block("expressions", RIGHT, "the same function",
        ("x^2-1", "(x-1)(x+1)"), (r"m(\gamma^2-1)", r"m\gamma^2-m"), ("6m", r"m \cdot 6"), (r"\frac{x}{2}", "0.5x"), ("p - q", "-q+p"), ("2k+2", "2(k+1)"),
        ("x^3+3x-6", "-6 + 3x + x^3"), ("(a+5)(b+2)", "ab+2a+5b+10"), (r"\frac{11+9a}{20}", "0.55+0.45a"),
        (r"\cot x", r"\frac{\cos x}{\sin x}"), ("n^{2}-n+1", "n(n-1)+1"), (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), (r"e^{t} / 3", r"\frac{e^t}{3}"), ("2^{k-1}", r"\frac{2^k}{2}"),
        (r"\lfloor n/2\rfloor", r"\left\lfloor\frac{n}{2}\right\rfloor"), (r"\frac{1}{s+a}", "(s+a)^{-1}"),
        (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}"), ("-(n-1) / 2", r"\frac{1-n}{2}"),
        (r"\frac{1}{2a}(e^{a t} - e^{-a t})", r"\frac{e^{at}-e^{-at}}{2a}")),
    _block("expressions", WRONG, "another value",
        (r"3\sqrt{13}", r"\sqrt{13}"), (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}"), (r"\pi", "3"), ("6-5i", "6+5i"),
        (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}"), ("4", r"4\sqrt{2}"), ("2^{1009}", "2^{1008}"),
        (r"\frac{100!}{2^{50}}", r"\frac{100!}{2^{49}}"), (r"\sqrt{51}", "51"), (r"288\pi", "288"),
        (r"\log_2 8", "8"), (r"\frac{2}{7} \sqrt{53}", r"\frac{2}{7}\sqrt{51}"), (r"-\sqrt{3}", r"\sqrt{3}"),
        ("10!", "9!"), (r"\binom{5}{2}", "20")),
    _block("expressions", WRONG, "another function",
        ("x^2-1", "x^2+1"), ("p - q", "q - p"), ("2k+2", "2k"), (r"\frac{x}{2}", "2x"), ("n", "n+1"),
        ("2n", "n^2"), (r"\cot x", r"\tan x"), ("x", "y"), ("5x", "5"), ("2^{k}", "k^2"), ("|x|", "-x"),
        ("(a+5)(b+2)", "ab+10"), (r"\lfloor n/2\rfloor", r"\lceil n/2 \rceil"), ("e^{t}", "e^{-t}"),
        ("n^{2}-n+1", "n^2-n-1"), (r"\frac{1}{s+a}", r"\frac{1}{s-a}")),
    # ----------------------------------------------------------------- equations
    _block("equations", RIGHT, "a name before the value may be left out",
        ("x=5", "5"), ("k=1", "1"), ("y = 2x + 3", "2x+3"), ("f(x)=2 x", "2x"), ("M=2^{N-2}+1", "2^{N-2}+1"),
        ("k=n+1", "n+1"), (r"m_{\max }=n^{2}-n-1", "n^2-n-1"), (r"x \approx 5", "5")),
    _block("equations", RIGHT, "the same equation",
        ("y=2x+3", "y=3+2x"), ("y=2x+3", "2x-y+3=0"), ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}"),
        ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"), ("f(n)=n", "f(x)=x"), ("y=-2x", "2x+y=0"),
        ("f(x)=x+1", "y=x+1"), ("MR=SRMC", "SRMC=MR"), ("x^2+y^2=4", "y^2+x^2=4"),
        ("x^2+y^2=4", "2x^2+2y^2=8")),
    _block("equations", WRONG, "another equation",
        ("y=2x+3", "y=2x-3"), ("x=5", "y=5"), ("x=5", "x=6"), ("x=5", "6"),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z - 4 = 0"), ("f(x)=x", "f(x)=2-x"), ("y=2x+3", "x=2y+3"),
        (r"\frac{x^2}{4}+\frac{y^2}{3}=1", r"\frac{x^2}{16}+\frac{y^2}{12}=1"), ("x^2+y^2=4", "x^2+y^2=2"),
        ("f(x)=x, f(x)=2-x", "f(x)=x")),
    # ----------------------------------------------------------------- words, bases, times
    _block("words", RIGHT, "the same word",
        (r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "even"), (r"\text{even}", "Even"), (r"\text{(C)}", "C"),
        (r"\text{(B)}", "(B)"), (r"\text{B}", r"\textbf{(B)}"), (r"\text{east}", "East."),
        (r"\text{ellipse}", "an ellipse"), ("(B)", "B."), ("yes", r"\text{Yes}"),
        (r"\text{no solution}", "No solution"), ("5", "five")),
    _block("words", WRONG, "another word",
        (r"\text{Evelyn}", "Evan"), (r"\text{even}", "odd"), (r"\text{(C)}", "D"), ("(B)", "(E)"),
        (r"\text{east}", "west"), (r"\text{even}", "2"), ("yes", "no"), (r"\text{Navin}", "7"), ("A", "B"),
        ("5", "four"), (r"\text{ellipse}", "parabola")),
    _block("words", UNJUDGED, "a sentence may mean it or the contrary",
        (r"\text{even}", r"\text{not even}"), (r"\text{Evelyn}", r"\text{Evelyn perhaps}"),
        one_way=True),
    _block("bases", RIGHT, "the base may be left out",
        ("52_8", "52_{8}"), ("52_8", "52"), ("4210_{5}", "4210"), ("101_2", r"101_{2}")),
    _block("bases", WRONG, "another base or other digits",
        ("52_8", "52_9"), ("52_8", "53_8"), ("101_2", "5"), ("4210_{5}", "4211_5"), ("101_2", "101_3")),
    _block("times and ratios", RIGHT, "written alike", ("12:00", "12:00"), ("3:4", "3 : 4")),
    _block("times and ratios", WRONG, "another time or ratio",
        ("12:00", "1:00"), ("3:4", "4:3"), ("3:4:5", "3:4"), (r"1:2:3:\ldots", r"1:4:9:\ldots")),
    _block("times and ratios", UNJUDGED, "the same ratio, if it is one", ("3:4", "6:8")),
    _block("writing", RIGHT, "what surrounds an answer is not part of it",
        ("5", "$5$"), ("5", r"\(5\)"), ("5", "**5**"), ("5", "5."), ("5", r"\text{5}"), ("5", r"\mathbf{5}"),
        ("5", " 5 "), ("x+1", r"\left(x+1\right)"), (r"\frac{1}{2}", r"\displaystyle\frac{1}{2}"),
        ("2x", r"2\,x"), ("−5", "-5"), ("(1,2)", r"\left(1,\,2\right)"), (r"\quad(2,1)", "(2,1)"),
        (r"\boxed{7}", "7"), ("５", "5")),
    _block("unreadable", WRONG, "no mathematics in it",
        ("5", "???"), ("5", r"\frac{}{}"), ("x+1", "the usual one"), (r"\frac{1}{2}", "1//2/"),
        ("5", "I do not know"), one_way=True),
]  # fmt: skip

SOURCED = {
    47: [("1331 and 1728", "1728", WRONG), ("1331 and 1728", "1728 and 1331", RIGHT)],
    60: [("3*x-1*y+13=0", "3x + 4y + 14=0", WRONG), ("3*x-1*y+13=0", "3x-y+13=0", RIGHT)],
    14: [(r"\frac{1}{2004!}", r"\frac{1}{2006!}", WRONG), (r"\pm 2021", "2021", WRONG)],
    26: [("2x+4y-3=0", "y = -1/2*x + 3/4", RIGHT)],
    40: [(r"\frac{x^2}{4}+\frac{y^2}{3}=1", r"\frac{x^2}{16}+\frac{y^2}{12}=1", WRONG)],
    64: [(r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}", RIGHT)],
    71: [(r"(-\infty, 3)", "x<3", RIGHT), ("x<3", r"(-\infty, 3)", RIGHT)],
}
"""Issues of huggingface/Math-Verify that are about a verdict: (gold, answer, verdict)."""

HANGING = {
    59: r"10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}",
    63: r"\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2}(2^{2^{2^{2^{2^{16}}}}}))))",
    65: r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",
}
"""Issues that are about an answer on which math-verify hangs or eats all memory."""

TEXTS = [
    ("the last box counts", "2", r"First \boxed{1}. No: \boxed{2}.", RIGHT),
    ("the last box counts", "1", r"First \boxed{1}. No: \boxed{2}.", WRONG),
    ("a box that never closes is none", "7", r"\boxed{7} and then \boxed{8", RIGHT),
    ("a box goes before a last line", "7", "\\boxed{7}\nThe answer is 8.", RIGHT),
    ("two numbers are no statement", "7", "It is 7 or 8.", WRONG),
    ("a mention is no statement", "7", "We have 7 apples and eat them.", WRONG),
    ("issue 76: bold", "73", "= 905\n\nConsistent!\n\n✅ Final Answer: **73**", RIGHT),
    ("issue 76: bold", "234", "= 905\n\nConsistent!\n\n✅ Final Answer: **73**", WRONG),
    ("bold label", "73", "**Final Answer:** 73", RIGHT),
    ("the form of an answer is none", "5", r"Put the answer in \boxed{answer}.", WRONG),
    ("the form of an answer is none", "5", r"\boxed{5} (in the form \boxed{\ldots})", RIGHT),
    ("GSM8K", "72", "48+24=72\n#### 72", RIGHT),
    ("GSM8K", "72", "48+24=72\n#### 73", WRONG),
    ("nested braces", r"\frac{1}{2}", r"\boxed{\frac{1}{\text{2}}}", RIGHT),
    ("an empty answer", "5", "", WRONG),
    ("an empty box", "5", r"\boxed{}", WRONG),
    ("a set in a box", r"\{1,2\}", r"so $S=\boxed{\{2,1\}}$", RIGHT),
    ("a bare number", "42", " 42\n", RIGHT),
]
"""(what it is about, gold, completion, verdict)."""

LEAKS = [
    ("Q: 2+3?\nThe answer is 5.", "5", "Q: 2+3?\nThe answer is 5.", WRONG),
    ("Example: \\boxed{4}\nNow 2+3?", "4", "Example: \\boxed{4}\nNow 2+3?", WRONG),
    (
        "Example: \\boxed{4}\nNow 2+3?",
        "5",
        "Example: \\boxed{4}\nNow 2+3? It is \\boxed{5}.",
        RIGHT,
    ),
    ("Is it 7? Answer: 7", "7", "Is it 7? Answer: 7\nYes. Answer: 7", RIGHT),
]
"""(prompt, gold, completion that repeats it, verdict)."""

MEASURED = [
    (870000000.0, "8.7e8", RIGHT), (870000000.0, r"8.72 \times 10^8", RIGHT), (8.7e8, "9e8", WRONG),
    (1.325e-27, r"1.33 \times 10^{-27}", RIGHT), (1.325e-27, r"5 \times 10^{-30}", WRONG),
    (1.325e-27, "0", WRONG), (0.25, r"\frac{1}{4}", RIGHT), (0.25, "0.2", WRONG), (-3.3, "-3.31", RIGHT),
    (-3.3, "3.3", WRONG), (3.14159, r"\pi", RIGHT), (4.123, r"\sqrt{17}", RIGHT),
    (4.123, r"\sqrt{18}", WRONG), (50.0, r"50.2\text{ cm}", RIGHT),
]  # fmt: skip
"""(measured value, answer, verdict at a tolerance of one part in a hundred)."""


def pairs() -> list[tuple[str, str, str, str, str]]:
    """(topic, gold, stated, verdict, why) of every block, both ways where it is symmetric."""
    found = []
    for block in BLOCKS:
        for gold, stated in block.pairs:
            found.append((block.topic, gold, stated, block.verdict, block.why))
            if not block.one_way and gold != stated:
                found.append((block.topic, stated, gold, block.verdict, block.why))
    return found
