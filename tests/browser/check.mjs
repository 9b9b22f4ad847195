// Opens every page of the book in Chromium, from disk and without a network, at four
// widths in both themes, and looks: console errors, what it loads, typeset equations,
// figures, folded code and its switch, solutions, dials, previews, search, accessibility.
// node check.mjs HTML_FOLDER [PART OF A PAGE'S NAME]; prints what is wrong and exits
// with 1, or one line. The variable CHROMIUM says where the browser is.
import { readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join, relative, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core"), "utf8");
const html = resolve(process.argv[2] ?? "");
const some = process.argv[3] ?? "";
const WIDTHS = [390, 1024, 1100, 1440];
// Of the first load: requests, and bytes on pages with formulas and without.
const MOST = { requests: 25, formulas: 1.5e6, none: 0.8e6 };
const faults = [];

function pages(folder) {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      return entry.name.startsWith("_") || entry.name === "mathjax" ? [] : pages(path);
    }
    return entry.name.endsWith(".html") ? [path] : [];
  });
}

async function open(context, path, fault) {
  const page = await context.newPage();
  page.on("console", (m) => m.type() === "error" && fault(`console: ${m.text()}`));
  page.on("pageerror", (error) => fault(`script: ${error.message}`));
  page.on("requestfailed", (request) => fault(`failed: ${request.url()}`));
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) fault(`asks for ${request.url()}`);
  });
  const loaded = [];
  page.on("request", (request) => {
    if (request.url().startsWith("file:")) loaded.push(request.url());
  });
  await page.goto(pathToFileURL(path).href);
  await page.evaluate(() => window.MathJax?.startup?.promise);
  light(loaded, fault);
  await page.addStyleTag({ content: "* { transition: none !important; }" });
  return page;
}

function light(loaded, fault) {
  const size = (url) => statSync(fileURLToPath(url.split(/[?#]/)[0])).size;
  const bytes = loaded.map(size).reduce((a, b) => a + b, 0);
  const most = loaded.some((url) => url.includes("tex-chtml")) ? MOST.formulas : MOST.none;
  if (loaded.length > MOST.requests) fault(`${loaded.length} requests`);
  if (bytes > most && !/search\.html/.test(loaded[0])) fault(`loads ${bytes} bytes`);
}

async function equations(page, fault) {
  const { marked, typeset, errors } = await page.evaluate(() => ({
    marked: document.querySelectorAll("article .math").length,
    typeset: document.querySelectorAll("article .math mjx-container").length,
    errors: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
  }));
  if (typeset < marked) fault(`${marked} equations, ${typeset} typeset`);
  if (errors) fault(`${errors} equations with errors`);
  const stops = await page.$$eval("mjx-container[tabindex]", (all) =>
    all.filter((formula) => formula.scrollWidth <= formula.clientWidth).length,
  );
  if (stops) fault(`${stops} equations are stops of the tab key`);
}

async function figures(page, theme, fault) {
  const images = await page.$$eval("article :is(.cell_output, figure) img", (all) =>
    all
      .filter((image) => !image.hidden && image.checkVisibility())
      .map((image) => {
        image.loading = "eager";
        const bright = /brightness\((.+)\)/.exec(getComputedStyle(image).filter);
        return { source: image.src, factor: Number(bright?.[1] ?? 1) };
      }),
  );
  const empty = await page.$$eval("article img", async (all) => {
    const seen = all.filter((image) => !image.hidden && image.checkVisibility());
    for (const image of seen) image.loading = "eager";
    await Promise.all(seen.map((image) => image.decode().catch(() => {})));
    const empty = (image) => image.width < 20 || image.height < 20 || !image.naturalWidth;
    return seen.filter(empty).map((image) => image.getAttribute("src"));
  });
  for (const source of empty) fault(`${theme}: ${source} has no size`);
  const ground = await page.evaluate(() =>
    getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number),
  );
  for (const { source, factor } of images) {
    if (!source.startsWith("file:")) continue;
    const svg = readFileSync(fileURLToPath(source), "utf8");
    // text in black or white lies on something coloured
    const text = /<g id="text_\d+">(?:(?!<g id=).)*?style="fill: #(\w{6})/gs;
    const colours = new Set([...svg.matchAll(text)].map((found) => found[1]));
    for (const colour of colours) {
      if (/^(0{6}|f{6})$/.test(colour)) continue;
      const rgb = [0, 2, 4].map((n) => factor * parseInt(colour.slice(n, n + 2), 16));
      const ratio = contrast(rgb, ground);
      if (ratio < 4.5) fault(`${theme}: text #${colour} in a figure, ${ratio.toFixed(2)}:1`);
    }
  }
}

function contrast(...colours) {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [a, b] = colours.map((rgb) => {
    const [red, green, blue] = rgb.map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  });
  return Math.max(a, b) / Math.min(a, b);
}

// Code opens by itself, and all of it by the switch, which the next page remembers.
async function code(page, fault) {
  const folds = page.locator("article details.hide");
  const open = page.locator("article details.hide[open]");
  const count = await folds.count();
  if (!count) return;
  if (await open.count()) fault("code is open at first");
  await folds.first().locator("summary").click();
  if ((await open.count()) !== 1) fault("folded code does not open");
  const all = page.getByRole("switch", { name: "Show all code" });
  await all.press("Space");
  if ((await open.count()) !== count) fault("the switch does not open all code");
  // what a page stores reaches the process of the next one a little later
  for (let tries = 0; tries < 5; tries++) {
    await page.reload();
    if (await all.isChecked()) break;
  }
  if ((await open.count()) !== count) fault("the switch is not remembered");
  await all.uncheck();
  if (await open.count()) fault("the switch does not fold the code");
}

async function previews(page, fault) {
  const links = page.locator('article a.reference[href^="#equation"]:visible');
  if (!(await links.count())) return;
  const preview = page.locator(".link-preview");
  await links.first().focus();
  if (!(await preview.innerHTML())) fault("no preview of an equation");
  await page.keyboard.press("Escape");
  if (await preview.isVisible()) fault("the preview stays");
}

async function solutions(page, fault) {
  const shut = await page.evaluate(() => {
    const folds = [...document.querySelectorAll("article .solution.dropdown")];
    return folds.filter((fold) => {
      const before = fold.getBoundingClientRect().height;
      (fold.querySelector("button, summary, .toggle-button") ?? fold).click();
      return fold.getBoundingClientRect().height <= before;
    }).length;
  });
  if (shut) fault(`${shut} solutions do not open`);
}

async function dials(page, fault) {
  const stuck = await page.$$eval("article figure.dial", (all) =>
    all.filter((dial) => {
      const input = dial.querySelector("input");
      return [input.max, input.min].some((value) => {
        input.value = value;
        input.dispatchEvent(new Event("input"));
        const seen = [...dial.querySelectorAll("img")].map((image) => !image.hidden);
        const said = input.getAttribute("aria-valuetext");
        const dumb = said !== dial.querySelector("output").value;
        return dumb || seen.filter(Boolean).length !== 1 || !seen[value];
      });
    }).length,
  );
  if (stuck) fault(`${stuck} dials show no picture or several, or do not say their value`);
}

async function fits(page, width, theme, fault) {
  await page.setViewportSize({ width, height: 900 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) fault(`${theme}: ${wide} pixels wide on a screen of ${width}`);
}

async function accessible(page, theme, fault) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() =>
    window.axe.run(document, { preload: false, resultTypes: ["violations"] }),
  );
  for (const { impact, id, nodes } of violations) {
    if (impact === "serious" || impact === "critical") {
      const where = nodes[0].target.join(" ");
      fault(`${theme}: ${impact} ${id}, ${nodes.length} times, first at ${where}`);
    }
  }
}

async function search(context, fault) {
  const page = await open(context, join(html, "search.html"), fault);
  await page.goto(`${page.url()}?q=momentum+attention`);
  const found = page.locator("#search-results li p.context").first();
  await found.waitFor({ timeout: 20000 }).catch(() => fault("search shows no excerpt"));
  const to = page.locator("#search-results li p.context a[href*='#']").first();
  await to.waitFor({ timeout: 5000 }).catch(() => fault("search leads to no section"));
  await page.close();
}

// What lies on another page is previewed where there is a server.
async function across() {
  const link = 'a.reference.internal[href*=".html#equation"]';
  const path = all.find((one) => /class="reference internal" href="[^"#]+#equation/.test(readFileSync(one, "utf8")));
  if (!path) return;
  const page = await browser.newPage();
  await page.route("**", (route) =>
    route.fulfill({ path: join(html, new URL(route.request().url()).pathname) }),
  );
  await page.goto(`http://site.test/${relative(html, path)}`);
  await page.evaluate(() => window.MathJax.startup.promise);
  await page.locator(`article ${link}:visible`).first().focus();
  const formula = page.locator(".link-preview mjx-container").first();
  const fault = () => faults.push(`${relative(html, path)}: no preview across pages`);
  await formula.waitFor({ timeout: 20000 }).catch(fault);
  await page.close();
}

// A server gives 404.html for any address; its links must lead back from all depths.
async function lost() {
  const text = readFileSync(join(html, "404.html"), "utf8");
  const page = await browser.newPage();
  await page.route("**", (route) => route.fulfill({ contentType: "text/html", body: text }));
  for (const path of ["none.html", "book/none.html"]) {
    await page.goto(`http://site.test/where/it/lies/${path}`);
    const links = await page.$$eval("a", (all) => all.map((link) => link.href));
    const outside = links.filter((link) => !/lies\/(book\/\w+|\w+)\.html$/.test(link));
    for (const link of outside) faults.push(`404.html under ${path} leads to ${link}`);
  }
  await page.close();
}

const executablePath = process.env.CHROMIUM;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
async function reader() {
  const viewport = { width: 1280, height: 900 };
  const context = await browser.newContext({ viewport, reducedMotion: "reduce" });
  await context.setOffline(true);
  context.setDefaultTimeout(120_000);
  return context;
}

const moves = (path) => readFileSync(path, "utf8").includes('http-equiv="Refresh"');
const all = pages(html).filter((path) => path.includes(some) && !moves(path));
async function check(path) {
  const fault = (text) => faults.push(`${relative(html, path)}: ${text}`);
  const context = await reader(); // of its own: what one stores, others do not see
  const page = await open(context, path, fault);
  await equations(page, fault);
  await code(page, fault);
  await solutions(page, fault);
  await dials(page, fault);
  await previews(page, fault);
  for (const theme of ["light", "dark"]) {
    await page.evaluate((name) => (document.documentElement.dataset.theme = name), theme);
    for (const width of WIDTHS) await fits(page, width, theme, fault);
    await figures(page, theme, fault);
    // the widest screen in light, the narrowest in dark
    if (theme === "dark") await fits(page, WIDTHS[0], theme, fault);
    await accessible(page, theme, fault);
  }
  await context.close();
}
// Two pages at a time.
const left = [...all];
async function work() {
  while (left.length) await check(left.pop());
}
await Promise.all([work(), work()]);
await lost();
await across();
await search(await reader(), (text) => faults.push(`search.html: ${text}`));
await browser.close();
for (const text of new Set(faults)) console.log(text);
if (faults.length) process.exit(1);
console.log(`${all.length} pages opened: nothing amiss`);
