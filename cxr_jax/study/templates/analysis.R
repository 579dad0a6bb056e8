# Redoes the numbers of analysis.json from rows.csv:  Rscript analysis.R [rows.csv]
# Needs lme4 and ordinal. Prints one line a number: its place in analysis.json, a tab, the value.
suppressMessages({ library(lme4); library(ordinal) })
arms <- c(@ARMS@)
labels <- c(@LABELS@)
arguments <- commandArgs(trailingOnly = TRUE)
d <- read.csv(if (length(arguments)) arguments[1] else "rows.csv", check.names = FALSE)
d <- d[d$practice == 0 & d$state == "signed", ]
d$arm <- factor(d$arm, levels = arms)
say <- function(name, value) cat(name, "\t", format(value, digits = 12), "\n", sep = "")

# ---- Time: log seconds, reader, case and reader-by-arm at random, REML ----
t <- d[!is.na(d$active_s) & d$active_s > 0 & d$clock_ok == 1, ]
t$y <- log(t$active_s)
t$abnormal <- t$truth - mean(t$truth)
t$s <- t$session - mean(t$session)
t$p <- t$position / 10 - mean(t$position / 10)
for (kind in c("model", "without_reader_by_arm")) {
  form <- "y ~ arm"
  if (length(unique(t$truth)) > 1) form <- "y ~ arm * abnormal"
  if (length(unique(t$session)) > 1) form <- paste(form, "+ s")
  form <- paste(form, "+ p + (1 | reader) + (1 | case)")
  if (kind == "model") form <- paste(form, "+ (1 | reader:arm)")
  m <- suppressMessages(lmer(as.formula(form), t))
  if (kind == "model") first_model <- m
  b <- coef(summary(m))
  for (arm in arms[-1]) {
    say(paste0("time.", kind, ".", arm, ".estimate"), b[paste0("arm", arm), 1])
    say(paste0("time.", kind, ".", arm, ".standard_error"), b[paste0("arm", arm), 2])
  }
}

# ---- Difference of two arms, readers and cases at random, Satterthwaite; of readers' means in a split study ----
by_student <- function(g, se, df) c(g, se, df, g - qt(.975, df) * se, g + qt(.975, df) * se, 2 * pt(-abs(g / se), df))
contrast <- function(rows, name, first, second) {
  rows <- rows[!is.na(rows[[name]]), ]
  reader <- factor(rows$reader); case <- factor(rows$case)
  cells <- function(arm) {
    i <- rows$arm == arm
    tapply(rows[[name]][i], list(reader[i], case[i]), mean) # levels without a row stay: NA
  }
  if (@SPLIT@) {
    x <- rowMeans(cells(second), na.rm = TRUE) - rowMeans(cells(first), na.rm = TRUE)
    x <- x[is.finite(x)]
    return(by_student(mean(x), sd(x) / sqrt(length(x)), length(x) - 1))
  }
  D <- cells(second) - cells(first)
  D <- D[rowSums(!is.na(D)) > 0, colSums(!is.na(D)) > 0, drop = FALSE]
  # Pairs that are missing are filled by the additive model, and cost a degree of freedom each (Yates 1933).
  missing <- is.na(D)
  D[missing] <- mean(D, na.rm = TRUE)
  for (i in 1:200) D[missing] <- (outer(rowMeans(D), colMeans(D), "+") - mean(D))[missing]
  R <- nrow(D); C <- ncol(D); g <- mean(D)
  dfe <- (R - 1) * (C - 1) - sum(missing)
  MR <- C * sum((rowMeans(D) - g)^2) / (R - 1)
  MC <- R * sum((colMeans(D) - g)^2) / (C - 1)
  E <- D - outer(rowMeans(D), colMeans(D), "+") + g
  ME <- sum(E^2) / dfe
  v <- MR + MC - ME
  if (v < ME) v <- max(v, MR, MC)
  df <- v^2 / (MR^2 / (R - 1) + MC^2 / (C - 1) + ME^2 / dfe)
  by_student(g, sqrt(v / (R * C)), df)
}
say_contrast <- function(place, rows, name, first, second) {
  if (!all(c(first, second) %in% arms)) return(invisible(NULL))
  x <- contrast(rows, name, first, second)
  names <- c("estimate", "standard_error", "degrees", "low", "high", "p_value")
  for (i in 1:6) say(paste0(place, ".", names[i]), x[i])
  invisible(x)
}
b <- fixef(first_model)
t$adjusted <- t$y - t$p * b["p"] - (if ("s" %in% names(b)) t$s * b["s"] else 0)
say_contrast("time.contrast.full/manual", t, "adjusted", "manual", "full")

# ---- Confidence: cumulative logit, reader, case and reader by arm at random, Laplace ----
k <- d[!is.na(d$confidence), ]
k$reader <- factor(k$reader); k$case <- factor(k$case); k$reader_arm <- interaction(k$reader, k$arm, drop = TRUE)
m <- clmm(factor(confidence) ~ arm + (1 | reader) + (1 | case) + (1 | reader_arm), data = k)
# A variance of nothing has no curvature: what is left is the model without it.
if (anyNA(coef(summary(m))[, 2])) m <- clmm(factor(confidence) ~ arm + (1 | reader) + (1 | case), data = k)
b <- coef(summary(m))
for (arm in arms[-1]) {
  say(paste0("confidence.", arm, ".estimate"), b[paste0("arm", arm), 1])
  say(paste0("confidence.", arm, ".standard_error"), b[paste0("arm", arm), 2])
}
say_contrast("confidence.mean_points.full-labels", k, "confidence", "labels", "full")

# ---- Detection: logit, reader, case and reader by arm at random, Laplace ----
if (all(c("labels", "full") %in% arms)) {
  e <- d[d$planted == 1 & d$arm %in% c("labels", "full") & !is.na(d$detected_label), ]
  e$full <- as.integer(e$arm == "full")
  shares <- tapply(e$detected_label, e$full, mean)
  # Pairs of one reader and case, as analysis.json takes them; a split study has none.
  pairs <- merge(e[e$full == 1, ], e[e$full == 0, ], by = c("reader", "case"))
  gap <- mean(pairs$detected_label.x - pairs$detected_label.y)
  if (length(shares) == 2) say("detection.gap", if (nrow(pairs)) gap else shares[["1"]] - shares[["0"]])
  if (length(shares) == 2 && all(shares > 0 & shares < 1)) {
    # Its usual tolerance stops 1e-3 short of the optimum where a variance is nothing.
    m <- suppressMessages(glmer(detected_label ~ full + (1 | reader) + (1 | case) + (1 | reader:full), e,
      family = binomial, control = glmerControl(tolPwrss = 1e-10)))
    b <- coef(summary(m))
    say("detection.estimate", b["full", 1])
    say("detection.standard_error", b["full", 2])
  }
}

# ---- Whom it misleads: planted errors in the signed report, and the second part of H3 (one-sided, doubled) ----
planted <- d[d$planted == 1, ]
say_contrast("detection.of_readers.full-labels", planted, "detected_label", "labels", "full")
x <- say_contrast("over_reliance.contrast", planted, "carried", "manual", "full")
if (!is.null(x)) say("over_reliance.p_one_sided", pt((x[1] - @MARGIN@) / x[2], x[3]))

# ---- AUC: Obuchowski and Rockette with Hillis' degrees of freedom, jackknife covariances ----
auc <- function(score, truth) {
  p <- score[truth == 1]; n <- score[truth == 0]
  mean(outer(p, n, ">") + 0.5 * outer(p, n, "=="))
}
obuchowski_rockette <- function(score, truth) { # [arms, readers, cases]
  T <- dim(score)[1]; R <- dim(score)[2]; N <- dim(score)[3]
  flat <- matrix(score, T * R, N) # arms vary fastest
  theta <- matrix(apply(flat, 1, auc, truth), T, R)
  jack <- sapply(1:N, function(i) apply(flat[, -i, drop = FALSE], 1, auc, truth[-i]))
  V <- cov(t(jack)) * (N - 1)^2 / N
  arm <- rep(1:T, R); reader <- rep(1:R, each = T)
  cov2 <- mean(V[outer(arm, arm, "==") & !outer(reader, reader, "==")])
  cov3 <- mean(V[!outer(arm, arm, "==") & !outer(reader, reader, "==")])
  M <- rowMeans(theta)
  MST <- R * var(M)
  E <- theta - outer(M, colMeans(theta), "+") + mean(theta)
  MSE <- sum(E^2) / ((T - 1) * (R - 1))
  den <- MSE + R * max(cov2 - cov3, 0)
  df2 <- (T - 1) * (R - 1) * (den / MSE)^2
  F <- MST / den
  c(F, df2, pf(F, T - 1, df2, lower.tail = FALSE), M)
}
d$rating_any <- apply(d[paste0("rating_", labels)], 1, max)
# One label that is so is enough, whatever nobody knows of the others.
d$truth_any <- apply(d[paste0("truth_", labels)], 1, function(x) if (1 %in% x) 1 else max(x))
for (label in c(labels, "any")) {
  u <- d[!is.na(d[[paste0("truth_", label)]]) & !is.na(d[[paste0("rating_", label)]]), ]
  score <- tapply(u[[paste0("rating_", label)]], list(u$arm, u$reader, u$case), mean)
  truth <- tapply(u[[paste0("truth_", label)]], u$case, max)
  whole <- apply(!is.na(score), 3, all)
  score <- score[, , whole, drop = FALSE]; truth <- truth[whole]
  if (min(sum(truth), sum(1 - truth)) < 10) next
  x <- obuchowski_rockette(score, truth)
  say(paste0("auc.", label, ".f_value"), x[1])
  say(paste0("auc.", label, ".degrees"), x[2])
  say(paste0("auc.", label, ".p_value"), x[3])
  for (i in seq_along(arms)) say(paste0("auc.", label, ".", arms[i]), x[3 + i])
}

# ---- Label F1 of the signed reports ----
for (arm in arms) {
  u <- d[d$arm == arm, ]
  say(paste0("label_f1.", arm), 2 * sum(u$true_positive) /
    (2 * sum(u$true_positive) + sum(u$false_positive) + sum(u$false_negative)))
}
