// Charts of the last hour, each with the same in words. Lines differ by dash as well as by colour.
import uPlot from "/dashboard/vendor/uplot.js";
import { make } from "/dashboard/core.js";

const HEIGHT = 150;
const SPARSE = 60; // values
const DASH = [undefined, [6, 4]];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function styled() {
  if (document.getElementById("chart-style")) return;
  const link = make("link");
  link.id = "chart-style";
  link.rel = "stylesheet";
  link.href = "/dashboard/vendor/uplot.css";
  document.head.append(link);
}

function inWords(label, values, tell) {
  const known = values.filter((v) => v !== null);
  if (!known.length) return `${label}: nothing seen in the last hour`;
  const least = known.reduce((a, b) => Math.min(a, b));
  const most = known.reduce((a, b) => Math.max(a, b));
  return `${label}: last ${tell(known[known.length - 1])}, least ${tell(least)}, most ${tell(most)}`;
}

// `lines`: [name of the column, its label] of each line, two at most; `tell`: a value in words.
export class Chart {
  constructor(title, lines, tell) {
    styled();
    this.lines = lines;
    this.tell = tell;
    this.node = make("figure", null, "card chart");
    const caption = this.node.appendChild(make("figcaption"));
    caption.append(make("h3", title));
    this.words = lines.map((_, i) => {
      const line = caption.appendChild(make("p", null, "dim"));
      if (lines.length > 1) line.append(make("span", null, `swatch line-${i + 1}`));
      return line.appendChild(make("span"));
    });
    this.more = caption.appendChild(make("p", "", "dim"));
    this.place = this.node.appendChild(make("div", null, "plot"));
    this.place.setAttribute("aria-hidden", "true"); // the words say it
    this.plot = null;
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.repaint = () => this.plot?.redraw();
    this.scheme.addEventListener("change", this.repaint);
    this.sized = new ResizeObserver(() => this.plot?.setSize({ width: this.place.clientWidth, height: HEIGHT }));
    this.sized.observe(this.place);
  }

  update(series, more = "") {
    const columns = this.lines.map(([name]) => series.columns[name]);
    this.lines.forEach(([, label], i) => { this.words[i].textContent = inWords(label, columns[i], this.tell); });
    this.more.textContent = more;
    this.more.hidden = !more;
    const length = columns[0].length;
    const times = Array.from({ length }, (_, i) => series.end - (length - i) * series.step);
    const none = columns.every((column) => column.every((v) => v === null));
    this.place.hidden = none;
    if (none) return;
    if (this.plot) this.plot.setData([times, ...columns]);
    else this.plot = new uPlot(this.options(), [times, ...columns], this.place);
  }

  options() {
    const axis = { stroke: () => colour("--dim"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
    return {
      width: Math.max(this.place.clientWidth, 100), height: HEIGHT, legend: { show: false }, cursor: { show: false },
      scales: { y: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] } },
      axes: [{ ...axis, space: 60 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((v) => this.tell(v)) }],
      series: [{}, ...this.lines.map((_, i) => ({
        stroke: () => colour(`--line-${i + 1}`), width: 2, dash: DASH[i], spanGaps: false,
        points: { size: 4, show: (u, at) => u.data[at].filter((v) => v !== null).length < SPARSE }, // one alone is no line
      }))],
    };
  }

  close() {
    this.scheme.removeEventListener("change", this.repaint);
    this.sized.disconnect();
    this.plot?.destroy();
  }
}
