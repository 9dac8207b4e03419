// Lays out the items of a report. Whatever comes from the data becomes text or an attribute, never markup.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const grid = byId("grid");
  const isPair = data.runs.length > 1;
  const SIDES = ["A", "B"];
  const LONG_TEXT = 120; // letters; longer ones are cut off after four lines until somebody asks for more
  const STEP_SECONDS = 0.05; // two videos further apart than this are brought together

  // ---- pictures: a block is parsed when the first picture of it is wanted
  const blocks = [...document.querySelectorAll("script.block")];
  const opened = new Map();
  function picture(index) {
    if (index === undefined) return "";
    const number = Math.floor(index / data.pictures_in_a_block);
    if (!opened.has(number)) opened.set(number, JSON.parse(blocks[number].textContent));
    return `data:image/jpeg;base64,${opened.get(number)[index % data.pictures_in_a_block]}`;
  }

  // ---- elements: attributes are named here, never by the data; strings among the children become text
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== "") element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // ---- one item
  function figure(take, name, caption) {
    const source = picture(take.pictures[name]);
    if (!source) return null;
    return make("figure", {}, make("img", { src: source, alt: "", decoding: "async" }), make("figcaption", {}, caption));
  }

  function text(label, words, kind = "") {
    return words ? [make("dt", {}, label), make("dd", { class: kind }, words)] : [];
  }

  function firstFrameCaption(take) {
    const facts = [
      ...(take.attempts > 1 ? [`best of ${take.attempts}`] : []),
      ...(take.similarity === null ? [] : [`similarity ${take.similarity.toFixed(2)}`]),
    ];
    return facts.length ? `first frame (${facts.join(", ")})` : "first frame";
  }

  function pictures(take) {
    const figures = [
      figure(take, "reference", "reference"),
      figure(take, "cutout", "cut-out"),
      figure(take, "first_frame", firstFrameCaption(take)),
    ].filter((one) => one !== null);
    return figures.length ? make("div", { class: "pictures" }, ...figures) : null;
  }

  function texts(take, withPrompt) {
    const rows = [
      ...(withPrompt ? text("prompt", take.prompt) : []),
      ...text("spatial", take.spatial),
      ...text("temporal", take.temporal),
      ...take.notes.flatMap((note) => text("note", note, "quiet")),
    ];
    if (!rows.length) return null;
    const list = make("dl", { class: "texts" }, ...rows);
    if (!rows.some((row) => row.textContent.length > LONG_TEXT)) return list;
    const more = make("button", { type: "button", class: "more", "aria-expanded": "false" }, "more");
    more.addEventListener("click", () => {
      const isOpen = list.classList.toggle("open");
      more.setAttribute("aria-expanded", isOpen);
      more.textContent = isOpen ? "less" : "more";
    });
    return make("div", {}, list, more);
  }

  function alarms(take) {
    const found = [
      ...(take.failure ? [["failed", take.failure]] : []),
      ...take.troubles.map((trouble) => ["unreadable", trouble]),
      ...(take.rejected ? [["rejected", "this take was rejected"]] : []),
    ];
    return found.map(([kind, words]) => make("p", { class: "alarm" }, make("b", {}, `${kind}: `), words));
  }

  function number(value, digits = 3) {
    return value === null || value === undefined ? "–" : value.toFixed(digits);
  }

  function measures(take) {
    const rows = [
      ...data.metrics
        .filter((metric) => metric.name in take.scores)
        .map((metric) => [metric.label, number(take.scores[metric.name]), take.no_score[metric.name] ?? ""]),
      ...data.stages
        .filter((stage) => stage.name in take.seconds)
        .map((stage) => [`${stage.label}, s`, number(take.seconds[stage.name], 1), ""]),
    ];
    if (!rows.length) return null;
    return make(
      "dl",
      { class: "measures" },
      ...rows.map(([label, value, why]) => make("div", { title: why }, make("dt", {}, label), make("dd", {}, value))),
    );
  }

  function video(take, run, item, attributes) {
    const shape = `${data.runs[run].width} / ${data.runs[run].height}`;
    if (!take || !take.video) {
      const empty = make("div", { class: "empty" }, take ? "no video" : "not in this run");
      empty.style.aspectRatio = shape;
      return empty;
    }
    const name = isPair ? `video of ${item.key}, run ${SIDES[run]}` : `video of ${item.key}`;
    const shared = { src: take.video, poster: picture(take.pictures.still), preload: "none", playsinline: true };
    const element = make("video", { ...shared, ...attributes, "aria-label": name });
    element.muted = true; // the attribute alone does not mute an element that a script has made
    element.style.aspectRatio = shape;
    element.addEventListener("error", () => {
      const words = "this browser cannot play the file; is it still beside the page?";
      if (element.src) element.after(make("p", { class: "alarm" }, words));
    });
    return element;
  }

  function fillSingle(card, item) {
    const take = item.takes[0];
    card.append(
      video(take, 0, item, { controls: true, loop: true, muted: true }),
      make("h3", { id: `item-${item.place}` }, item.key),
      ...alarms(take),
      ...[pictures(take), texts(take, true), measures(take)].filter((part) => part !== null),
    );
    card.toggle = () => playOrPause(card.querySelector("video"));
  }

  function playOrPause(element) {
    if (!element) return;
    if (element.paused) element.play().catch(() => {});
    else element.pause();
  }

  // ---- an item of two runs
  function fillPair(card, item) {
    const films = item.takes.map((take, run) => {
      const badge = make("span", { class: `side side${run}` }, SIDES[run]);
      return make("div", { class: "half" }, badge, video(take, run, item, { muted: true }), ...(take ? alarms(take) : []));
    });
    const sides = item.takes.map((take) => {
      const parts = take ? [pictures(take), texts(take, item.differs)] : [];
      return make("div", { class: "half" }, ...parts.filter((part) => part !== null));
    });
    const head = [make("h3", { id: `item-${item.place}` }, item.key)];
    if (!item.differs) head.push(make("p", { class: "prompt" }, item.takes.find((take) => take).prompt));
    card.append(...head, make("div", { class: "halves" }, ...films));
    const videos = [...card.querySelectorAll("video")];
    if (videos.length) card.append(together(card, videos, item.key));
    const table = differences(item);
    if (table) card.append(table);
    card.append(make("div", { class: "halves" }, ...sides));
  }

  function why(item, metric) {
    const reasons = item.takes.map((take, run) => (take?.no_score[metric] ? `${SIDES[run]}: ${take.no_score[metric]}` : ""));
    return reasons.filter(Boolean).join("; ");
  }

  function differences(item) {
    const [a, b] = item.takes;
    const rows = [
      ...data.metrics.map((one) => [one.label, a?.scores[one.name], b?.scores[one.name], why(item, one.name)]),
      ...data.stages.map((one) => [`${one.label}, s`, a?.seconds[one.name], b?.seconds[one.name], ""]),
    ].filter(([, mine, other]) => mine !== undefined || other !== undefined);
    if (!rows.length) return null;
    const cells = rows.map(([label, mine, other, reason]) => {
      const change = isNumber(mine) && isNumber(other) ? other - mine : null;
      const sign = change !== null && change > 0 ? "+" : "";
      const better = change === null ? 0 : change * (label.endsWith("↑") ? 1 : label.endsWith("↓") ? -1 : 0);
      const kind = better > 0 ? "better" : better < 0 ? "worse" : "";
      const values = [number(mine), number(other)].map((words) => make("dd", {}, words));
      return make("div", { title: reason }, make("dt", {}, label), ...values, make("dd", { class: kind }, sign + number(change)));
    });
    const names = ["A", "B", "B − A"].map((words) => make("dd", {}, words));
    return make("dl", { class: "measures pair" }, make("div", { class: "names" }, make("dt", {}, ""), ...names), ...cells);
  }

  // Plays videos in step: the longest leads, at its end all begin again; who has come off is put where the leader is.
  function together(card, videos, key) {
    const button = make("button", { type: "button", class: "play", "aria-label": `play the videos of ${key}` }, "▶");
    const slider = make("input", { type: "range", min: 0, max: 1000, value: 0, step: 1, "aria-label": `time in the videos of ${key}` });
    const clock = make("span", { class: "quiet" });
    let isPlaying = false;
    const length = (one) => (Number.isFinite(one.duration) ? one.duration : 0);
    const leader = () => videos.reduce((best, one) => (length(one) > length(best) ? one : best));
    const place = (one, seconds) => {
      const wanted = Math.min(seconds, length(one));
      const ahead = one.currentTime - wanted;
      const isApart = Math.abs(ahead) > STEP_SECONDS;
      // from a server that sends files only whole a browser cannot seek, it would begin again: go faster or slower, then
      const canSeek = one.seekable.length > 0 && one.seekable.end(one.seekable.length - 1) >= wanted;
      if (isApart && canSeek && !one.seeking) one.currentTime = wanted;
      if (!canSeek) one.playbackRate = isApart ? (ahead > 0 ? 0.8 : 1.25) : 1;
    };
    const show = () => {
      const lead = leader();
      if (document.activeElement !== slider || isPlaying) slider.value = length(lead) ? (1000 * lead.currentTime) / length(lead) : 0;
      clock.textContent = `${lead.currentTime.toFixed(2)} s`;
    };
    const start = () => Promise.all(videos.filter((one) => one.currentTime < length(one)).map((one) => one.play()));
    const stop = () => {
      isPlaying = false;
      videos.forEach((one) => one.pause());
      videos.forEach((one) => place(one, leader().currentTime));
      button.textContent = "▶";
    };
    const step = () => {
      if (!isPlaying || !card.isConnected || !card.contains(button)) return videos.forEach((one) => one.pause());
      const lead = leader();
      if (lead.ended) {
        videos.forEach((one) => (one.currentTime = 0));
        start().catch(stop);
      } else if (!lead.seeking) {
        videos.filter((one) => one !== lead && !one.ended).forEach((one) => place(one, lead.currentTime));
      }
      show();
      requestAnimationFrame(step);
    };
    const play = async () => {
      isPlaying = true;
      button.textContent = "❚❚";
      await Promise.all(videos.map(ready));
      videos.forEach((one) => place(one, leader().currentTime));
      if (leader().ended) videos.forEach((one) => (one.currentTime = 0));
      await start().catch(stop);
      step();
    };
    card.toggle = () => (isPlaying ? stop() : play());
    button.addEventListener("click", card.toggle);
    videos.forEach((one) => one.addEventListener("click", card.toggle));
    slider.addEventListener("input", async () => {
      if (isPlaying) stop();
      await Promise.all(videos.map(ready));
      const seconds = (slider.value / 1000) * length(leader());
      videos.forEach((one) => (one.currentTime = Math.min(seconds, length(one))));
      clock.textContent = `${seconds.toFixed(2)} s`;
    });
    return make("div", { class: "together" }, button, slider, clock);
  }

  // When it can be played, or it is known that it cannot.
  function ready(element) {
    if (element.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA || element.error) return Promise.resolve();
    return new Promise((resolve) => {
      for (const name of ["canplay", "error"]) element.addEventListener(name, resolve, { once: true });
      element.preload = "auto";
      if (element.networkState !== HTMLMediaElement.NETWORK_LOADING) element.load();
    });
  }

  // ---- cards: empty shells, filled while they are near the window
  const cards = data.items.map((item, place) => {
    item.place = place;
    const known = item.takes.filter((take) => take);
    item.differs = known.some((take) => take.prompt !== known[0].prompt);
    const words = known.flatMap((take) => [take.prompt, take.spatial, take.temporal]);
    item.haystack = [item.key, ...words].join("\n").toLowerCase();
    const card = make("article", { class: "card", tabindex: -1, "aria-label": item.key, "data-key": item.key });
    card.item = item;
    return card;
  });

  function fill(card) {
    if (card.firstChild) return;
    (isPair ? fillPair : fillSingle)(card, card.item);
    card.style.minHeight = "";
  }

  function empty(card) {
    if (!card.firstChild || card.contains(document.activeElement)) return;
    card.style.minHeight = `${card.offsetHeight}px`; // else what is below would jump
    for (const element of card.querySelectorAll("video")) {
      element.removeAttribute("src");
      element.load(); // a page may hold only so many open videos
    }
    card.replaceChildren();
    card.toggle = undefined;
  }

  const near = new IntersectionObserver(
    (entries) => entries.forEach((entry) => (entry.isIntersecting ? fill(entry.target) : empty(entry.target))),
    { rootMargin: "900px 0px" },
  );

  // ---- which items, in which order
  const [query, identity, state, sort, direction] = ["query", "identity", "state", "sort", "direction"].map(byId);
  const isNumber = (value) => typeof value === "number";
  const STATES = {
    all: () => true,
    failed: (take) => take.failure !== "",
    no_video: (take) => take.video === "",
    rejected: (take) => take.rejected,
    unreadable: (take) => take.troubles.length > 0,
  };
  const orders = new Map([["name", ["name", (item) => item.place]]]);
  const kinds = [...data.metrics.map((one) => ["scores", one]), ...data.stages.map((one) => ["seconds", one])];
  for (const [kind, { name, label }] of kinds) {
    const words = kind === "scores" ? label : `${label}, s`;
    data.runs.forEach((_, run) => {
      const own = isPair ? `${SIDES[run]}: ${words}` : words;
      orders.set(`${kind} ${name} ${run}`, [own, (item) => item.takes[run]?.[kind][name]]);
    });
    if (isPair) {
      const change = ({ takes: [a, b] }) => (isNumber(a?.[kind][name]) && isNumber(b?.[kind][name]) ? b[kind][name] - a[kind][name] : null);
      orders.set(`${kind} ${name} change`, [`B − A: ${words}`, change]);
    }
  }
  let isDescending = false;
  let shown = [];
  let current = null;

  function compare(value) {
    const sign = isDescending ? -1 : 1;
    return (a, b) => {
      const [first, second] = [value(a.item), value(b.item)];
      if (!isNumber(first) || !isNumber(second)) return isNumber(second) - isNumber(first) || a.item.place - b.item.place;
      return sign * (first - second) || a.item.place - b.item.place;
    };
  }

  function select() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const isLike = STATES[state.value];
    const isWanted = ({ item }) =>
      (identity.value === "" || item.identity === identity.value) &&
      words.every((word) => item.haystack.includes(word)) &&
      item.takes.some((take) => take && isLike(take));
    shown[0]?.setAttribute("tabindex", "-1");
    shown = cards.filter(isWanted).sort(compare(orders.get(sort.value)[1]));
    if (!shown.includes(current)) mark(null);
    near.disconnect();
    grid.replaceChildren(...shown);
    shown.forEach((card, place) => {
      card.setAttribute("aria-posinset", place + 1);
      card.setAttribute("aria-setsize", shown.length);
      near.observe(card);
    });
    shown.slice(0, isPair ? 2 : 6).forEach(fill); // at once: the observer waits for the next picture
    (current ?? shown[0])?.setAttribute("tabindex", "0");
    byId("count").textContent = shown.length === cards.length ? `${cards.length} items` : `${shown.length} of ${cards.length} items`;
    byId("nothing").hidden = shown.length > 0;
  }

  function clear() {
    query.value = identity.value = "";
    state.value = "all";
    select();
  }

  // ---- the item that keys speak to
  function mark(card) {
    for (const other of [current, shown[0]]) other?.setAttribute("tabindex", "-1");
    current = card;
    current?.setAttribute("tabindex", "0");
  }

  function go(card) {
    if (!card) return;
    fill(card);
    mark(card);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: isPair ? "start" : "nearest" });
  }

  function move(by) {
    if (current) return go(shown[shown.indexOf(current) + by]);
    const top = document.querySelector(".toolbar").getBoundingClientRect().bottom;
    go(shown.find((card) => card.getBoundingClientRect().bottom > top) ?? shown[0]);
  }

  const dialog = byId("keys");
  const steps = { j: 1, k: -1, ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const inField = event.target.matches("input, select, textarea");
    const onControl = inField || event.target.matches("button, summary, video, a");
    const inItem = grid.contains(document.activeElement);
    if (event.key === "Escape") {
      clear();
      if (inField) event.target.blur();
    } else if (inField) return;
    else if (event.key === "/") query.focus();
    else if (event.key === "?") dialog.showModal();
    else if (event.key in steps && (event.key.length === 1 || (inItem && !onControl))) move(steps[event.key]);
    else if (event.key === " " && inItem && !onControl) (document.activeElement.closest(".card") ?? current)?.toggle?.();
    else return;
    event.preventDefault();
  }

  // ---- start
  for (const name of new Set(data.items.map((item) => item.identity))) identity.append(make("option", { value: name }, name));
  for (const [value, [label]] of orders) sort.append(make("option", { value }, value === "name" ? "sort by name" : label));
  query.addEventListener("input", select);
  for (const field of [identity, state, sort]) field.addEventListener("change", select);
  document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
  direction.addEventListener("click", () => {
    isDescending = !isDescending;
    direction.textContent = isDescending ? "↓" : "↑";
    direction.title = isDescending ? "descending" : "ascending";
    direction.setAttribute("aria-label", isDescending ? "descending; press for ascending" : "ascending; press for descending");
    select();
  });
  byId("help").addEventListener("click", () => dialog.showModal());
  byId("failures")?.addEventListener("click", (event) => {
    const place = event.target.dataset.item;
    if (place === undefined) return;
    if (!shown.includes(cards[place])) clear();
    go(cards[place]);
  });
  grid.addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    if (card && card !== current) mark(card);
  });
  document.addEventListener("keydown", onKey);
  select();
})();
