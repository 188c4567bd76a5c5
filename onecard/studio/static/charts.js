// Curves: drawn by uPlot in the colours of the theme, kept up to date by what the studio sends.
import { api } from "/static/api.js";

// Distinguishable by those who see few colours, and 3:1 against both grounds. After https://personal.sron.nl/~pault/
export const COLOURS = ["#3b7dd8", "#d2691e", "#1f9070", "#b4519d", "#8a6fd1", "#9a7d0a", "#2f8fb3", "#cc4b4b", "#6b7a8f", "#a0653a"];
const MOST_POINTS = 3000; // of a series that has grown; then it is loaded anew, thinned
const HALF_A_PIXEL = 0.5;
const BINARY = Array.from({ length: 60 }, (_, power) => 2 ** power); // bytes between ticks
const WHOLE = Array.from({ length: 9 }, (_, power) => [1, 2, 5].map((one) => one * 10 ** power)).flat(); // steps between ticks

function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// A chart in an element. lines: [{label, values: [steps, values], colour, dots}]; tell(value) writes a number, `step` is
// the word for what the values are drawn over, and `binary` says that they are bytes.
export class Chart {
  constructor(element, { title, tell, step, height = 220, logarithmic = false, binary = false }) {
    Object.assign(this, { element, title, tell, step, height, logarithmic, binary, lines: [], plot: null, shape: "", drawn: [], ends: [] });
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(element);
  }

  draw(lines) {
    this.lines = lines.filter((line) => line.values && line.values[0].length);
    this.element.setAttribute("role", "img");
    this.element.setAttribute("aria-label", this.summary());
    const shape = JSON.stringify([this.title, this.logarithmic, this.binary, ...this.lines.map((line) => [line.label, line.colour])]);
    const isSame = this.plot && shape === this.shape;
    if (isSame && this.lines.every((line, at) => this.looksAsDrawn(line, this.drawn[at]))) return;
    this.drawn = this.lines.map(({ values: [steps] }) => ({ steps, n: steps.length }));
    const data = this.lines.length ? uPlot.join(this.lines.map((line) => line.values)) : [[]];
    const before = this.ends; // the plot's own steps may be the array that has grown
    this.ends = [data[0][0], data[0].at(-1)];
    if (isSame) return this.replace(data, before);
    this.shape = shape;
    if (this.plot) this.plot.destroy();
    this.element.replaceChildren();
    this.plot = this.lines.length && this.element.clientWidth ? new uPlot(this.options(), data, this.element) : null;
    if (!this.plot) this.shape = "";
  }

  // Other data in the same plot; a stretch that was chosen with the mouse stays.
  replace(data, [first, last]) {
    const { min, max } = this.plot.scales.x;
    const isZoomed = min > first || max < last;
    this.plot.setData(data, !isZoomed);
    if (isZoomed) this.plot.redraw();
  }

  // Whether what a line grew by since it was drawn cannot be seen: it is narrower than a pixel and no new extreme.
  looksAsDrawn({ values: [steps, values], dots }, drawn) {
    if (steps !== drawn.steps) return false; // loaded anew
    if (steps.length === drawn.n) return true;
    const { x, y } = this.plot.scales;
    const width = (steps.at(-1) - x.max) / (x.max - x.min) * this.element.clientWidth;
    const added = values.slice(drawn.n).filter((value) => value !== null);
    return !dots && width < HALF_A_PIXEL && added.every((value) => value >= y.min && value <= y.max);
  }

  // What a screen reader says: the newest value of each line.
  summary() {
    const told = this.lines.map((line) => {
      const [steps, values] = line.values;
      return `${line.label} ${this.tell(values[values.length - 1])} (${steps[steps.length - 1]})`;
    });
    return [this.title, ...told].join(", ");
  }

  options() {
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    return {
      width: this.element.clientWidth, height: this.height, title: this.title,
      scales: { x: { time: false }, y: { distr: this.logarithmic ? 3 : 1 } },
      legend: { live: true },
      cursor: { drag: { x: true, y: false }, points: { size: 6 } },
      axes: [{ ...axis, incrs: WHOLE, size: 30 }, { ...axis, size: 64, ...(this.binary ? { incrs: BINARY } : {}), values: (plot, ticks) => ticks.map((tick) => (tick === null ? "" : this.tell(tick))) }],
      series: [
        { label: this.step, value: (plot, value) => (value === null ? "–" : String(value)) },
        ...this.lines.map((line) => ({
          label: line.label, stroke: line.colour, width: 1.6, spanGaps: true, points: { show: Boolean(line.dots), size: 6 },
          value: (plot, value) => (value === null || value === undefined ? "–" : this.tell(value)),
        })),
      ],
    };
  }

  resize() {
    if (this.plot && this.element.clientWidth) this.plot.setSize({ width: this.element.clientWidth, height: this.height });
    else if (this.lines.length && this.element.clientWidth) this.draw(this.lines);
  }

  redraw() {
    this.shape = "";
    this.draw(this.lines);
  }

  destroy() {
    this.observer.disconnect();
    if (this.plot) this.plot.destroy();
  }
}

// The curves of one run: loaded whole once, then only what was added.
export class RunCurves {
  constructor(id) {
    Object.assign(this, { id, mark: "", next: 0, series: {}, loading: null, missed: null });
  }

  // `shown` is called with a few points of a long log, and again with all.
  async load(shown = () => {}) {
    const path = `/api/runs/${encodeURIComponent(this.id)}/rows?max_points=1500`;
    const taken = (found) => {
      Object.assign(this, { mark: found.mark, next: found.next, series: found.series });
      shown();
    };
    const all = async () => {
      this.missed = null;
      if (!this.mark) {
        const first = await api("GET", `${path}&preview=1`);
        taken(first);
        if (!first.is_preview && (!this.missed || this.add(this.missed))) return;
      }
      // What came meanwhile may be later than the answer.
      do {
        this.missed = null;
        taken(await api("GET", path));
      } while (this.missed && !this.add(this.missed));
    };
    this.loading ??= all().finally(() => { this.loading = null; });
    await this.loading;
    return this;
  }

  // Take in news of `rows`. false: they do not follow on what is here, so it has to be loaded again.
  add(news) {
    const isKnown = this.follows(news);
    if (!isKnown || this.loading) this.missed = news; // the answer that is awaited may have been made before it
    return isKnown;
  }

  follows(news) {
    if (news.next <= this.next && news.mark === this.mark) return true;
    if (!news.series || news.mark !== this.mark || news.from !== this.next) return false;
    for (const [name, [steps, values]] of Object.entries(news.series)) {
      const known = (this.series[name] ??= [[], []]);
      known[0].push(...steps);
      known[1].push(...values);
      if (known[0].length > MOST_POINTS) return false;
    }
    this.next = news.next;
    return true;
  }
}
