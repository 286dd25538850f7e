// Asks over a document and shows where the chunks of its K/V are, as the server's stream tells.
const $ = (id) => document.getElementById(id);
const STATES = [
  ["a", "attended", "looked at, and in the set that decode steps read"],
  ["h", "hot", "in that set"],
  ["f", "prefetching", "being copied for the next set"],
  ["p", "predicted", "there for the next set"],
  ["c", "cold", "in CPU memory"],
  [".", "to-come", "not computed yet"],
];
let model = null, running = null, strip = "";

for (const [, name, meaning] of STATES) {
  const item = $("legend").appendChild(document.createElement("li"));
  item.title = meaning;
  item.appendChild(document.createElement("i")).className = name;
  item.append(`${name.replace("-", " ")} `);
  item.appendChild(document.createElement("span")).id = `count-${name}`;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function draw() {
  const canvas = $("strip"), style = getComputedStyle(canvas), scale = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const count = strip.length;
  if (!count) return;
  const rows = Math.max(1, Math.min(Math.floor(height / 12), Math.round(Math.sqrt((count * height) / width))));
  const columns = Math.ceil(count / rows), w = width / columns, h = height / rows, gap = w > 4 ? 1 : 0;
  const colours = Object.fromEntries(STATES.map(([letter, name]) => [letter, style.getPropertyValue(`--${name}`).trim()]));
  [...strip].forEach((letter, at) => {
    const x = (at % columns) * w, y = Math.floor(at / columns) * h;
    pen.fillStyle = colours[letter] ?? colours.c;
    // not by colour alone: what the model reads stands taller than what it does not
    const tall = letter === "a" ? 1 : letter === "h" ? 0.82 : letter === "." || letter === "c" ? 0.45 : 0.64;
    pen.fillRect(x, y + (h - 1) * (1 - tall), Math.max(w - gap, 0.5), (h - 1) * tall);
  });
}

function show(told) {
  strip = told.chunks;
  const counts = STATES.map(([letter, name]) => [name, [...strip].filter((one) => one === letter).length]);
  for (const [name, number] of counts) $(`count-${name}`).textContent = number;
  const said = counts.filter(([, number]) => number).map(([name, number]) => `${number} ${name.replace("-", " ")}`);
  $("strip").setAttribute("aria-label", `${strip.length} chunks: ${said.join(", ")}`);
  $("strip").dataset.states = strip;
  figures(told);
  draw();
}

function figures({ keep_ratio, coverage }) {
  $("keep-ratio").textContent = keep_ratio.toFixed(3);
  $("coverage").textContent = coverage === null ? "–" : coverage.toFixed(2);
}

const headers = () => ({
  "Content-Type": "application/json",
  ...($("key").value && { Authorization: `Bearer ${$("key").value}` }),
});

async function refused(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`the server answered ${response.status}`);
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refused(response);
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

async function post(signal) {
  const text = [$("document").value, $("question").value].filter(Boolean).join("\n\n");
  const common = {
    model,
    max_tokens: Number($("tokens").value),
    stream: true,
    stream_options: { include_usage: true },
    forecache: { policy: $("policy").value, keep_ratio: Number($("keep").value), show_chunks: true },
  };
  const send = (path, body) =>
    fetch(path, { method: "POST", headers: headers(), body: JSON.stringify({ ...common, ...body }), signal });
  const response = await send("v1/chat/completions", { messages: [{ role: "user", content: text }] });
  if (response.ok) return response;
  const error = await refused(response);
  if (!error.message.includes("no chat template")) throw error;
  const completion = await send("v1/completions", { prompt: text });
  if (!completion.ok) throw await refused(completion);
  return completion;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

async function ask() {
  running = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  $("answer").textContent = "";
  say("Asking …");
  const start = performance.now();
  let first = 0, tokens = 0, end = "";
  try {
    if (model === null) await findModel();
    const response = await post(running.signal);
    for await (const line of lines(response.body)) {
      if (line.startsWith(": prefill")) say(`Reading: ${line.slice(10)} tokens`);
      if (!line.startsWith("data: {")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      if (event.forecache) show(event.forecache);
      if (event.usage) figures(event.usage.forecache);
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text;
      end = choice?.finish_reason ?? end;
      if (!text) continue;
      const now = performance.now();
      if (!first) {
        first = now;
        $("first").textContent = `${((now - start) / 1000).toFixed(1)} s`;
        say("Answering …");
      }
      tokens += 1;
      if (tokens > 1) $("speed").textContent = (((tokens - 1) * 1000) / (now - first)).toFixed(1);
      const atEnd = $("answer").scrollHeight - $("answer").scrollTop - $("answer").clientHeight < 40;
      $("answer").append(text);
      if (atEnd) $("answer").scrollTop = $("answer").scrollHeight;
    }
    say(end === "length" ? "The answer has its full length." : "Done.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    running = null;
    $("ask").disabled = false;
    $("stop").disabled = true;
  }
}

const measure = () => ($("size").textContent = `${$("document").value.length} characters`);
$("document").addEventListener("input", measure);
$("keep").addEventListener("input", () => ($("keep-said").textContent = $("keep").value));
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) $("document").value = await file.text();
  measure();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running === null) ask();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
$("key").addEventListener("change", () => findModel().then(() => say("Ready."), (error) => say(error.message, true)));
findModel().catch((error) => {
  $("model").textContent = "";
  say(error.message, true);
});
