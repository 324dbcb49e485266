// Charts in the reader's colours, and the browser of outputs. Text reaches the page as
// textContent alone.
const read = (id) => JSON.parse(document.getElementById(id).textContent);

// --- charts

const { charts, themes } = read("chart-data");
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

// The key above the charts stands for their legends; `ast` evaluates expressions without eval.
async function draw(name, spec) {
  const theme = themes[dark.matches ? "dark" : "light"];
  const result = await vegaEmbed(`#chart-${CSS.escape(name)}`, spec, {
    actions: false, ast: true, renderer: "svg", tooltip: { theme: "custom" },
    config: { ...theme, legend: { disable: true } },
  });
  views.get(name)?.finalize();
  views.set(name, result);
}
const drawAll = () => Promise.all(Object.entries(charts).map(([name, spec]) => draw(name, spec)));

dark.addEventListener("change", drawAll);
drawAll().then(() => document.documentElement.setAttribute("data-drawn", ""));

// --- examples

const form = document.getElementById("browser");
if (form) browse(read("example-data"));

function browse({ texts, tasks, sizes, arms }) {
  const PAGE = 10;
  const list = document.getElementById("list");
  const more = document.getElementById("more");
  const count = document.getElementById("count");
  let shown = PAGE;

  const value = (name) => form.elements[name].value;
  const task = () => tasks[value("task")];
  const unique = (values) => [...new Set(values)];
  const labels = (graded) => graded
    ? { all: "all", both: "same score", a: "A scores higher", b: "B scores higher" }
    : { all: "all", both: "both right", a: "only A right", b: "only B right", none: "both wrong" };

  function fill(name, options, wanted) {
    const select = form.elements[name];
    const before = select.value || String(wanted ?? "");
    select.replaceChildren(...options.map(([key, label]) => new Option(label, key)));
    if (options.some(([key]) => String(key) === before)) select.value = before;
  }
  const same = (values) => values.map((v) => [v, v]);

  function refill() {
    const cells = task().cells;
    const have = unique(cells.map((c) => c.arm));
    const ordered = [...arms, "base"].filter((arm) => have.includes(arm));
    fill("n", same(sizes.filter((n) => cells.some((c) => c.n === n))));
    fill("seed", same(unique(cells.map((c) => c.seed)).sort((x, y) => x - y)));
    fill("a", same(ordered), ordered[0]);
    fill("b", same(ordered), ordered[1] ?? ordered[0]);
    fill("filter", Object.entries(labels(task().graded)), "all");
  }

  // An arm without this n, as the base, is shown with the one cell that it has.
  function cell(arm) {
    const own = task().cells.filter((c) => c.arm === arm);
    const at = own.filter((c) => c.n === Number(value("n")));
    const near = at.length ? at : own.filter((c) => !sizes.includes(c.n));
    return near.find((c) => c.seed === Number(value("seed"))) ?? (at.length ? undefined : near[0]);
  }

  function passes(a, b) {
    const kind = value("filter");
    if (kind === "all") return true;
    if (task().graded)
      return kind === "both" ? a === b : kind === "a" ? a > b : b > a;
    return { both: a && b, a: a && !b, b: b && !a, none: !a && !b }[kind];
  }

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function side(title, text, score) {
    const box = element("div");
    const head = element("h4", title);
    if (score !== undefined) head.append(element("span", score, "score"));
    box.append(head, element("p", text === "" ? "(empty)" : text));
    return box;
  }

  function scoreText(score) {
    if (!task().graded) return score ? "right" : "wrong";
    return `${task().score} ${(100 * score).toFixed(1)}`;
  }

  function show() {
    const a = cell(value("a"));
    const b = cell(value("b"));
    if (!a || !b) {
      count.textContent = "One of the arms has no finished cell here.";
      list.replaceChildren();
      more.hidden = true;
      return;
    }
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const { prompts, targets } = task();
    const rows = prompts.map((_, i) => i).filter((i) => {
      if (!passes(a.scores[i], b.scores[i])) return false;
      const all = [prompts[i], targets[i], a.outputs[i], b.outputs[i]]
        .map((t) => texts[t]).join("\n").toLowerCase();
      return words.every((word) => all.includes(word));
    });
    count.textContent = `${rows.length} of ${prompts.length} rows`
      + (rows.length > shown ? `, ${shown} shown` : "");
    list.replaceChildren(...rows.slice(0, shown).map((i) => {
      const box = element("div", undefined, "example");
      const sides = element("div", undefined, "sides");
      sides.append(
        side("Target", texts[targets[i]]),
        side(`A: ${a.arm}`, texts[a.outputs[i]], scoreText(a.scores[i])),
        side(`B: ${b.arm}`, texts[b.outputs[i]], scoreText(b.scores[i])),
      );
      box.append(element("h3", `Row ${i + 1}`), element("p", texts[prompts[i]]), sides);
      return box;
    }));
    more.hidden = rows.length <= shown;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "task") refill();
    shown = PAGE;
    show();
  });
  more.addEventListener("click", () => {
    shown += PAGE;
    show();
  });
  fill("task", Object.entries(tasks).map(([key, { title }]) => [key, title]));
  refill();
  show();
}
