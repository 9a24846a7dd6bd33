// The page asks once a second for what it shows, and shows it: no row more than is on it.

const EVERY_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 3000 : 1000;
const SPANS_S = [60, 120, 300, 600]; // that lines are of: the first that holds all there is
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

// Words and numbers.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const number = (value) => (value === null || value === undefined ? "–" : whole.format(value));
const rate = (value) => (value === null || value === undefined ? "–" : value < 10 ? value.toFixed(1) : whole.format(value));
const percent = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`);

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(1)} s`;
  return value < 7200 ? `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s` : `${(value / 3600).toFixed(1)} h`;
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) [value, power] = [value / 1024, power + 1];
  return `${power ? value.toFixed(1) : value} ${units[power]}`;
}

function ago(epoch_s) {
  if (epoch_s === null) return "never";
  const since_s = Math.round(Date.now() / 1000 - epoch_s);
  if (since_s < 1) return "just now";
  return `${since_s < 120 ? `${since_s} s` : seconds(since_s)} ago`;
}

const STAGES = {
  tokenize: "tokenizing", grammar: "compiling its grammar", adapter: "loading its adapter", queue: "waiting", prefill: "prompt",
  decode: "answering", preempted: "waiting again", paused: "paused", delivery: "ending",
};
const HOLDS = { place: "for a row", pages: "for KV pages", turn: "for its turn" };
const STATES = { registered: "on disk", loading: "loading", host: "host memory", resident: "pool", failed: "failed" };

function why(row) {
  const gave_way = row.preemptions ? `gave way ${["", "once", "twice"][row.preemptions] ?? `${row.preemptions} times`}` : "";
  if (row.hold) {
    const before = row.ahead ? `, ${number(row.ahead)} before it` : ", next";
    return [`${HOLDS[row.hold]}${before}`, gave_way].filter(Boolean).join("; ");
  }
  if (row.stage === "adapter") return "for its adapter to be in the pool";
  if (row.stage === "tokenize") return "for its prompt to be tokenized";
  if (row.stage === "paused") return "for its client to read";
  return gave_way;
}

const LIMITS = {
  requests_per_s: (v) => `${v} requests/s`, tokens_per_s: (v) => `${number(v)} tokens/s`, burst_s: (v) => `bursts of ${v} s`,
  streams: (v) => `${v} streams`, queued_requests: (v) => `${v} queued`, queued_tokens: (v) => `${number(v)} tokens queued`,
  adapter_bytes: (v) => `${bytes(v)} of the pool`, upload_bytes: (v) => `${bytes(v)} of uploads`,
};
const limits = (row) => Object.entries(row.limits).map(([name, value]) => LIMITS[name](value)).join(", ") || "none";

// The tables: what each column is called, sorted by, and says. The first one names the row.

const TABLES = {
  requests: {
    what: "requests", looks: "id, tenant or adapter", sort: "age_s", order: "descending",
    columns: [
      { title: "Request", sort: "id", says: (row) => row.id, opens: (row) => explain(row) },
      { title: "Tenant", sort: "tenant", says: (row) => row.tenant },
      { title: "Adapter", sort: "adapter", says: (row) => row.adapter || "base model" },
      { title: "Version", sort: "version", number: true, says: (row) => row.version ?? "–" },
      { title: "Phase", sort: "stage", says: (row) => STAGES[row.stage] },
      { title: "Prompt", sort: "prompt_tokens", number: true, says: (row) => number(row.prompt_tokens) },
      { title: "Answer", sort: "output_tokens", number: true, says: (row) => `${number(row.output_tokens)} of ${number(row.max_tokens)}` },
      { title: "Age", sort: "age_s", number: true, says: (row) => seconds(row.age_s) },
      { title: "Why it waits", sort: "ahead", text: true, says: why },
    ],
  },
  ended: {
    what: "requests that ended", looks: "id, tenant, adapter or outcome", sort: "ended_at", order: "descending",
    columns: [
      { title: "Request", sort: "id", says: (row) => row.id, opens: (row) => explain(row) },
      { title: "Tenant", sort: "tenant", says: (row) => row.tenant },
      { title: "Adapter", sort: "adapter", says: (row) => row.adapter || "base model" },
      { title: "Outcome", sort: "outcome", says: (row) => row.outcome },
      { title: "Answer", sort: "output_tokens", number: true, says: (row) => number(row.output_tokens) },
      { title: "First token", sort: "first_token_s", number: true, says: (row) => seconds(row.first_token_s) },
      { title: "In all", sort: "total_s", number: true, says: (row) => seconds(row.total_s) },
      { title: "Ended", sort: "ended_at", number: true, says: (row) => ago(row.ended_at) },
    ],
  },
  adapters: {
    what: "adapters", looks: "name", sort: "tokens_per_s", order: "descending",
    columns: [
      { title: "Adapter", sort: "name", says: (row) => row.name },
      { title: "Version", sort: "version", number: true, says: (row) => row.version },
      { title: "Where", sort: "state", says: (row) => STATES[row.state] + (row.pinned ? ", pinned" : "") },
      { title: "Size", sort: "bytes", number: true, says: (row) => bytes(row.bytes) },
      { title: "In use", sort: "in_flight", number: true, says: (row) => number(row.in_flight) },
      { title: "Tokens/s", sort: "tokens_per_s", number: true, says: (row) => rate(row.tokens_per_s) },
      { title: "Tokens", sort: "tokens", number: true, says: (row) => number(row.tokens) },
      { title: "Requests", sort: "requests", number: true, says: (row) => number(row.requests) },
      { title: "Last used", sort: "last_used_s", number: true, says: (row) => ago(row.last_used_s) },
      { title: "Trouble", sort: "trouble", text: true, says: (row) => row.trouble, class: "trouble" },
    ],
  },
  tenants: {
    what: "tenants", looks: "name", sort: "share", order: "descending",
    columns: [
      { title: "Tenant", sort: "tenant", says: (row) => row.tenant },
      { title: "Weight", sort: "weight", number: true, says: (row) => row.weight },
      { title: "Share", sort: "share", number: true, says: (row) => percent(row.share) },
      { title: "Tokens/s", sort: "tokens_per_s", number: true, says: (row) => rate(row.tokens_per_s) },
      { title: "Running", sort: "running", number: true, says: (row) => number(row.running) },
      { title: "Waiting", sort: "waiting", number: true, says: (row) => number(row.waiting) },
      { title: "Requests", sort: "requests", number: true, says: (row) => number(row.requests) },
      { title: "Prompt tokens", sort: "prompt_tokens", number: true, says: (row) => number(row.prompt_tokens) },
      { title: "Answer tokens", sort: "output_tokens", number: true, says: (row) => number(row.output_tokens) },
      { title: "Refused", sort: "refused", number: true, says: (row) => number(row.refused) },
      { title: "Limits", text: true, says: limits },
    ],
  },
};

const CHARTS = [
  { title: "Tokens a second", unit: rate, lines: [["answers", "generated_tokens_per_s"], ["prompts", "prompt_tokens_per_s"]] },
  { title: "Requests", unit: number, lines: [["running", "running"], ["waiting", "waiting"]] },
  { title: "First token", unit: seconds, lines: [["50 %", "first_token_p50"], ["95 %", "first_token_p95"]] },
  { title: "Between tokens", unit: seconds, lines: [["50 %", "between_p50"], ["99 %", "between_p99"]] },
];

// Small things of the document.

function element(tag, facts = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, facts, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// What has not changed is left alone: a reader may have marked it.
function say(node, text) {
  text = String(text);
  if (node.textContent !== text) node.textContent = text;
}

// For those who listen: what changed by itself, or by them; never what changes every second.
const announce = (text) => say(at("said"), text);

let trouble = "";
function fail(text) {
  if (text !== trouble) announce((trouble = text));
}

// A table: its head is made once, its rows are filled again and again.

class Listing {
  constructor(name) {
    Object.assign(this, TABLES[name], { name, page: 1, search: "" });
    const place = at(name);
    this.found = element("p", { className: "found" });
    this.input = element("input", { type: "search", id: `${name}-search`, placeholder: this.looks });
    const label = element("label", {}, "Search", this.input);
    this.back = element("button", { type: "button" }, "Back");
    this.next = element("button", { type: "button" }, "Next");
    this.where = element("span");
    const pager = element("nav", { className: "pager", "aria-label": `Pages of ${this.what}` }, this.back, this.where, this.next);
    this.head = this.columns.map((column) => this.heading(column));
    this.body = element("tbody");
    const table = element("table", { "aria-labelledby": `${name}-title` }, element("thead", {}, element("tr", {}, ...this.head)), this.body);
    const scroll = element("div", { className: "scroll", tabindex: "0", role: "region", "aria-label": `Table of ${this.what}` }, table);
    place.append(element("div", { className: "bar" }, this.found, label, pager), scroll);
    this.input.addEventListener("input", () => this.ask({ search: this.input.value, page: 1 }));
    this.back.addEventListener("click", () => this.ask({ page: this.page - 1 }));
    this.next.addEventListener("click", () => this.ask({ page: this.page + 1 }));
    this.mark();
  }

  heading(column) {
    const cell = element("th", { scope: "col", className: column.number ? "number" : "" });
    if (!column.sort) {
      cell.append(column.title);
      return cell;
    }
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => this.by(column));
    cell.append(button);
    return cell;
  }

  by(column) {
    const first = column.number ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    this.order = this.sort === column.sort && this.order === first ? other : first;
    this.sort = column.sort;
    this.mark();
    announce(`${this.what} sorted by ${column.title.toLowerCase()}, ${this.order}`);
    this.ask({ page: 1 });
  }

  mark() {
    this.columns.forEach((column, place) => {
      if (column.sort === this.sort) this.head[place].setAttribute("aria-sort", this.order);
      else this.head[place].removeAttribute("aria-sort");
    });
  }

  ask(change) {
    Object.assign(this, change);
    look();
  }

  query() {
    const { name, sort, order, search, page } = this;
    return [[`${name}.sort`, sort], [`${name}.order`, order], [`${name}.search`, search], [`${name}.page`, page]];
  }

  show({ rows, found, page, pages }) {
    // Whoever is at a row, or reads of one, finds it where it was.
    if (this.body.contains(document.activeElement) || at("why").open) return;
    this.page = page;
    say(this.found, this.search ? `${number(found)} found` : `${number(found)} in all`);
    say(this.where, `Page ${number(page)} of ${number(pages)}`);
    this.back.disabled = page <= 1;
    this.next.disabled = page >= pages;
    while (this.body.rows.length > Math.max(rows.length, 1)) this.body.deleteRow(-1);
    if (!rows.length) {
      const cell = element("td", { colSpan: this.columns.length }, this.search ? "Nothing of that kind." : "None now.");
      this.body.replaceChildren(element("tr", { className: "none" }, cell));
      return;
    }
    if (this.body.rows[0]?.className === "none") this.body.replaceChildren();
    rows.forEach((row, place) => this.fill(this.body.rows[place] ?? this.body.appendChild(this.blank()), row));
  }

  blank() {
    const cells = this.columns.map((column, place) => {
      const kinds = [column.number ? "number" : "", column.text ? "text" : "", column.class ?? ""].join(" ").trim();
      return place ? element("td", { className: kinds }) : element("th", { scope: "row", className: kinds });
    });
    const line = element("tr", {}, ...cells);
    const { opens } = this.columns[0];
    if (opens) {
      const button = element("button", { type: "button" });
      button.addEventListener("click", () => opens(line.row));
      cells[0].append(button);
    }
    return line;
  }

  fill(line, row) {
    this.columns.forEach((column, place) => say(line.cells[place].firstElementChild ?? line.cells[place], column.says(row)));
    if (line.cells[0].title !== line.cells[0].textContent) line.cells[0].title = line.cells[0].textContent;
    line.row = row;
  }
}

// Lines over time.

class Chart {
  constructor({ title, unit, lines }) {
    Object.assign(this, { title, unit, lines });
    this.values = lines.map(() => element("span"));
    this.top = element("span", { className: "top" });
    this.paths = lines.map((_, place) => drawn("polyline", { class: place ? "second" : "first" }));
    const grid = [1, 50, 99].map((y) => drawn("line", { x1: 0, x2: 100, y1: y, y2: y }));
    this.picture = drawn("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" }, ...grid, ...this.paths);
    this.begin = element("span");
    const ends = element("div", { className: "ends", ariaHidden: "true" }, this.begin, element("span", {}, "now"));
    const caption = element("figcaption", {}, element("strong", {}, title), element("span", { className: "key" }, ...this.values));
    at("charts").append(element("figure", {}, caption, element("div", { className: "plot" }, this.top, this.picture, ends)));
  }

  show(history, now_s) {
    const columns = this.lines.map(([, name]) => history[name]);
    const most = Math.max(...columns.flat().filter((value) => value !== null), 0);
    const high = nice(most);
    const span_s = SPANS_S.find((span) => now_s - history.at_s[0] <= span) ?? SPANS_S.at(-1);
    say(this.top, most ? this.unit(high) : "");
    say(this.begin, `${span_s / 60} min ago`);
    columns.forEach((column, place) => {
      const points = column.map((value, index) => (value === null ? null : [100 - (100 * (now_s - history.at_s[index])) / span_s, 98 - (96 * value) / (high || 1)]));
      this.paths[place].setAttribute("points", points.filter(Boolean).map(([x, y]) => `${x.toFixed(2)},${y.toFixed(1)}`).join(" "));
      say(this.values[place], `${this.lines[place][0]} ${this.unit(column.at(-1))}`);
    });
    const now = this.lines.map(([name], place) => `${name} ${this.unit(columns[place].at(-1))}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.title} over the last ${span_s / 60} minutes. Now: ${now}. Highest: ${this.unit(most)}.`);
  }
}

// The next of 1, 2 and 5 times a power of ten.
function nice(value) {
  if (value <= 0) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((times) => times * power >= value) * power;
}

// What is there once.

function show_figures({ load, history }) {
  const last = (name) => history[name].at(-1);
  const figures = [
    ["Running", number(load.running)],
    ["Waiting", number(load.waiting)],
    ["Preparing", number(load.preparing)],
    ["Paused", number(load.paused)],
    ["Tokens a second", rate(last("generated_tokens_per_s"))],
    ["First token, 95\u00a0%", seconds(last("first_token_p95"))],
    ["Between tokens, 99\u00a0%", seconds(last("between_p99"))],
    ["Gave way", number(load.preemptions)],
    ["Failures", number(load.failures)],
  ];
  const place = at("figures");
  figures.forEach(([name, value], index) => {
    place.children[index] ?? place.append(element("div", {}, element("dt", {}, name), element("dd")));
    say(place.children[index].lastChild, value);
  });
}

function show_bars(place, bars) {
  bars.forEach(([name, value, share], index) => {
    if (!place.rows[index]) {
      const bar = element("progress", { max: 1, "aria-label": name });
      place.append(element("tr", {}, element("th", { scope: "row" }, name), element("td"), element("td", {}, bar)));
    }
    const line = place.rows[index];
    say(line.cells[0], name);
    say(line.cells[1], value);
    line.cells[2].firstChild.value = share;
  });
}

function show_memory({ pages, pool, slots }) {
  const all = pages.leased + pages.cached + pages.free;
  show_bars(at("memory"), [
    ["KV, requests", `${number(pages.leased)} of ${number(all)}`, pages.leased / all],
    ["KV, prefixes", number(pages.cached), pages.cached / all],
    ["Adapter pool", `${bytes(pool.used)} of ${bytes(pool.total)}`, pool.used / pool.total],
    ["Adapter slots", `${number(slots.used)} of ${number(slots.total)}`, slots.used / slots.total],
  ]);
}

// Where one request's time went.

// Without a tenant: whoever's request is called so. `refuse` is told if there is none.
async function explain(request, refuse = announce) {
  const { id } = request;
  const answer = await asked(`explanation?${new URLSearchParams(request.tenant ? { id, tenant: request.tenant } : { id })}`);
  const found = await answer.json();
  if (!answer.ok) return refuse(found.error.message);
  say(at("why-title"), `${id}: ${seconds(found.total_s)}, ${found.outcome || "it runs"}`);
  say(at("why-says"), found.says);
  say(at("why-advice"), found.advice ? `What would have helped: ${found.advice}` : "");
  const lines = (found.parts ?? []).map((part) => {
    const [start, long] = [(part.start_s ?? 0) / found.total_s, (part.duration_s ?? 0) / found.total_s];
    const bar = drawn("rect", { x: 100 * start, y: 0, width: Math.max(100 * long, 0.7), height: 10 });
    const picture = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, bar);
    const name = element("th", { scope: "row" }, [part.stage, part.station].filter(Boolean).join(", "));
    return element("tr", {}, name, element("td", { className: "number" }, seconds(part.duration_s ?? 0)), element("td", { className: "when" }, picture));
  });
  at("why-parts").replaceChildren(...lines);
  at("why").showModal();
}

// All of it.

const listings = Object.keys(TABLES).map((name) => new Listing(name));
const charts = CHARTS.map((chart) => new Chart(chart));
const past = {};
let [paused, timer, looking, again] = [false, 0, false, false];

function remember(history) {
  for (const [name, column] of Object.entries(history)) past[name] = [...(past[name] ?? []), ...column].slice(-SPANS_S.at(-1));
}

function show(now) {
  const serving = now.phase === "serving" && !now.stuck;
  say(at("phase"), now.stuck ? "a step does not end" : now.phase);
  at("phase").className = `badge ${serving ? "good" : "bad"}`;
  if (!now.server) return fail("No engine yet: the model is being loaded.");
  if (trouble) fail("");
  const { model, version, device, dtype } = now.server;
  say(at("model"), `${model}, ${dtype} on ${device}, version ${version}`);
  remember(now.history);
  if (past.at_s.length) {
    show_figures({ load: now.load, history: past });
    charts.forEach((chart) => chart.show(past, now.at_s));
  }
  const step = Object.values(now.phases).reduce((sum, value) => sum + value, 0);
  show_bars(at("phases"), Object.entries(now.phases).map(([name, value]) => [name, seconds(value), step ? value / step : 0]));
  show_memory(now.load);
  listings.forEach((listing) => listing.show(now[listing.name]));
}

let needs_token = null; // nobody has said

function let_in(may, text) {
  at("entry").hidden = may;
  at("main").hidden = !may;
  if (!may) fail(text);
  return may;
}

function asked(path) {
  const token = sessionStorage.getItem("token");
  return fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
}

async function ask() {
  needs_token ??= (await (await fetch("entry")).json()).needs_token;
  const token = sessionStorage.getItem("token");
  if (!let_in(token || !needs_token, trouble || "A token is needed.")) return;
  const query = new URLSearchParams([["after", past.at_s?.at(-1) ?? 0], ...listings.flatMap((listing) => listing.query())]);
  const answer = await asked(`now?${query}`);
  if (!let_in(answer.status !== 401, "This token is not known here.")) {
    needs_token = true;
    return sessionStorage.removeItem("token");
  }
  const found = await answer.json();
  if (!answer.ok) return fail(found.error.message);
  if (!again) show(found); // else it is an answer to what nobody asks any more
}

// One question at a time; who asks meanwhile is answered next.
async function look() {
  if (looking) return void (again = true);
  [looking, again] = [true, false];
  clearTimeout(timer);
  try {
    await ask();
  } catch {
    say(at("phase"), "no answer");
    at("phase").className = "badge bad";
    if (!trouble) fail(`The server has not answered since ${new Date().toLocaleTimeString()}.`);
  }
  looking = false;
  if (again) return look();
  if (!paused && !document.hidden) timer = setTimeout(look, EVERY_MS);
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", paused);
  announce(paused ? "Paused: what you see is from when you pressed." : "");
  if (paused) clearTimeout(timer);
  else look();
});
at("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  look();
});
at("wanted").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = (text) => say(at("wanted-said"), text);
  said("");
  explain({ id: at("wanted-id").value.trim() }, said).catch(() => said("The server does not answer."));
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) look();
});
look();
